"""The generation engine and the fast weights: exact against the plain way, deterministic, and leaving no trace."""

import pytest
import torch
from safetensors import SafetensorError

from falconlib.config import LoraConfig, ModelConfig
from falconlib.errors import FalconError
from falconlib.policy import embedded
from falconlib.policy.fast_weights import Adapted, FastWeights, normalised_step
from falconlib.policy.generate import Row, generate, sample, stream
from falconlib.policy.models import first_line, load_policy, resolve_device, tiny_model
from falconlib.policy.score import HeadLogprobs, score
from falconlib.training import checkpoint
from falconlib.training.batches import Example, collate

PROMPTS = ["def add(a, b):", "Write a function that reverses a text.\n```python\n", "x"]
ROWS = [Row(i % 3, 50 + i, i % 3) for i in range(9)]


def run(policy, rows=ROWS, **settings):
    return generate(policy, PROMPTS, rows, **{"max_new_tokens": 10, "temperature": 0.8, **settings})


def transformers_logprobs(policy, prompt, tokens, temperature=1.0):
    """The plain way: one row, one forward of the model as transformers and peft have it, all logits."""
    ids = policy.encode(prompt)
    logits = policy.model(input_ids=torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1)[torch.arange(len(tokens)), torch.tensor(tokens)]


def random_deltas(policy, tasks, scale=0.2):
    generator = torch.Generator().manual_seed(1)
    return {n: scale * torch.randn(d.shape, generator=generator) for n, d in FastWeights(policy.model).zeros(tasks).items()}


def test_same_seeds_give_the_same_completions_and_other_seeds_others(tiny_policy):
    first, again = run(tiny_policy), run(tiny_policy)
    assert first == again
    assert run(tiny_policy, [Row(r.prompt, r.seed + 1000, r.task) for r in ROWS]) != first


def test_a_row_keeps_its_random_stream_when_others_come_and_go(tiny_policy):
    alone = run(tiny_policy, ROWS[4:5])
    assert alone[0].tokens == run(tiny_policy)[4].tokens


@pytest.mark.parametrize("batch_rows", [1, 4, 64])
def test_batch_size_changes_nothing(tiny_policy, batch_rows):
    assert [c.tokens for c in run(tiny_policy, batch_rows=batch_rows)] == [c.tokens for c in run(tiny_policy)]


@pytest.mark.parametrize("size", [1, 20])
def test_prompts_prefilled_in_several_chunks_give_the_same_completions(tiny_policy, monkeypatch, size):
    for deltas in (None, random_deltas(tiny_policy, 3)):
        whole = run(tiny_policy, deltas=deltas)
        with monkeypatch.context() as patch:
            patch.setattr("falconlib.policy.generate.PREFILL_TOKENS", size)
            assert [c.tokens for c in run(tiny_policy, deltas=deltas)] == [c.tokens for c in whole]


def test_log_probs_equal_those_of_a_plain_forward_with_unmerged_adapters(tiny_policy):
    completions = run(tiny_policy)
    for row, completion in zip(ROWS, completions, strict=True):
        plain = transformers_logprobs(tiny_policy, PROMPTS[row.prompt], completion.tokens, 0.8)
        assert torch.allclose(plain, torch.tensor(completion.logprobs), atol=1e-4)


def test_greedy_equals_transformers_generate(tiny_policy):
    ours = run(tiny_policy, [Row(0, 0)], temperature=0)[0].tokens
    ids = torch.tensor([tiny_policy.encode(PROMPTS[0])])
    theirs = tiny_policy.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    assert list(ours) == theirs[0, ids.shape[1] :].tolist()[: len(ours)]


def test_sampling_and_scoring_leave_weights_and_forwards_as_they_were(tiny_policy):
    before = {n: p.clone() for n, p in tiny_policy.model.named_parameters()}
    ids = torch.tensor([tiny_policy.encode(PROMPTS[0])])
    plain = tiny_policy.model(input_ids=ids).logits
    run(tiny_policy, deltas=random_deltas(tiny_policy, 3))
    with pytest.raises(RuntimeError), FastWeights(tiny_policy.model).active():
        raise RuntimeError
    assert all(torch.equal(p, before[n]) for n, p in tiny_policy.model.named_parameters())
    assert torch.equal(tiny_policy.model(input_ids=ids).logits, plain)


def test_a_stop_text_ends_a_completion(tiny_policy):
    letter = next(c.text for c in run(tiny_policy) if c.text.strip()).strip()[0]
    for completion in run(tiny_policy, stop=(letter,)):
        assert not completion.finished or letter in completion.text or completion.tokens[-1] == tiny_policy.eos
    assert any(c.finished and letter in c.text for c in run(tiny_policy, stop=(letter,)))


@pytest.mark.parametrize("adapted", [False, True])
def test_rows_that_end_leave_the_others_as_they_are(tiny_policy, adapted):
    rows = [Row(i % 3, 50 + i, i % 3) for i in range(24)]
    deltas = random_deltas(tiny_policy, 3) if adapted else None
    whole = run(tiny_policy, rows, max_new_tokens=24, deltas=deltas)
    letters = [letter for letter in "etaoinsr" if any(letter in c.text[2:] for c in whole)][:1]
    cut = run(tiny_policy, rows, max_new_tokens=24, deltas=deltas, stop=letters)
    sizes = [len(c.tokens) for c in cut]
    assert len({*sizes}) > 5, "rows end at different steps"
    for one, two in zip(cut, whole, strict=True):
        assert one.tokens == two.tokens[: len(one.tokens)]
        assert one.logprobs == pytest.approx(two.logprobs[: len(one.tokens)], abs=1e-4)


def test_greedy_rows_among_sampled_ones_are_greedy_and_change_no_other_row(tiny_policy):
    rows = [Row(r.prompt, r.seed, r.task, greedy=i % 2 == 0) for i, r in enumerate(ROWS)]
    mixed, sampled, greedy = run(tiny_policy, rows), run(tiny_policy), run(tiny_policy, temperature=0.0)
    assert [c.tokens for c in mixed[1::2]] == [c.tokens for c in sampled[1::2]]
    assert [c.tokens for c in mixed[::2]] == [c.tokens for c in greedy[::2]] != [c.tokens for c in sampled[::2]]
    assert all(bool(c.logprobs) != row.greedy for c, row in zip(mixed, rows, strict=True))


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(4000, 1)
    token, logprob = sample(logits, stream(0, 4000), 0.5, 1.0)
    expected = torch.softmax(logits[0] / 0.5, -1)
    assert torch.allclose(torch.bincount(token, minlength=3) / 4000, expected, atol=0.03)
    assert torch.allclose(logprob.exp(), expected[token])


def test_top_p_drops_the_tail_and_keeps_the_token_that_crosses_it():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(500, 1)
    assert sorted(set(sample(logits, stream(0, 500), 1.0, 0.6)[0].tolist())) == [0, 1]
    assert sorted(set(sample(logits, stream(0, 500), 1.0, 1.0)[0].tolist())) == [0, 1, 2, 3]


@pytest.mark.parametrize("spread", [8.0, 0.1], ids=["among the first tokens", "nearly flat"])
def test_top_p_is_the_same_with_and_without_the_short_cut(spread, monkeypatch):
    logits = torch.randn(40, 2000, generator=torch.Generator().manual_seed(0)) * spread
    short = sample(logits, stream(1, 40), 1.0, 0.9)
    monkeypatch.setattr("falconlib.policy.generate.NUCLEUS", 2000)
    assert all(torch.equal(a, b) for a, b in zip(short, sample(logits, stream(1, 40), 1.0, 0.9), strict=True))
    assert len(set(short[0].tolist())) > 5


@pytest.mark.parametrize("words", [3, 256, 1000])
def test_a_draw_inverts_the_cumulative_distribution(words):
    logits = torch.randn(50, words, generator=torch.Generator().manual_seed(0)) * 20  # most words have no weight at all
    uniform = torch.cat([torch.tensor([0.0, 1 - 2**-53]), stream(2, 48)]).double()
    token, logprob = sample(logits, uniform, 0.5, 1.0)
    ends = torch.softmax(logits.double() / 0.5, -1).cumsum(-1)
    expected = torch.searchsorted(ends, uniform[:, None] * ends[:, -1:]).squeeze(-1)
    assert torch.equal(token[2:], expected[2:])
    assert (token < words).all() and torch.isfinite(logprob).all()
    assert torch.allclose(logprob, torch.log_softmax(logits / 0.5, -1).gather(-1, token[:, None]).squeeze(-1), atol=1e-4)


def test_zero_deltas_change_no_bit(tiny_policy):
    fast = FastWeights(tiny_policy.model)
    ids = torch.tensor([tiny_policy.encode(PROMPTS[1])])
    found = []
    for deltas in (None, fast.zeros(1)):
        with fast.active(deltas):
            fast.select(torch.tensor([0]))
            found.append(tiny_policy.model(input_ids=ids).logits)
    assert torch.equal(*found)
    assert run(tiny_policy, deltas=fast.zeros(3)) == run(tiny_policy)


def test_adapted_generation_in_one_batch_equals_one_task_at_a_time(tiny_policy):
    deltas = random_deltas(tiny_policy, 3)
    together = run(tiny_policy, deltas=deltas)
    assert [c.tokens for c in together] != [c.tokens for c in run(tiny_policy)]
    for task in range(3):
        rows = [Row(r.prompt, r.seed, 0) for r in ROWS if r.task == task]
        alone = run(tiny_policy, rows, deltas={n: d[task : task + 1] for n, d in deltas.items()})
        assert [c.tokens for c in alone] == [c.tokens for c, r in zip(together, ROWS, strict=True) if r.task == task]


def test_a_task_at_zero_leaves_the_others_their_fast_weights(tiny_policy):
    deltas, plain = random_deltas(tiny_policy, 3), run(tiny_policy)
    moved = run(tiny_policy, deltas=deltas)
    for d in deltas.values():
        d[0] = 0
    found = run(tiny_policy, deltas=deltas)
    assert [c.tokens for c in found] == [
        c.tokens for c in (m if r.task else p for r, p, m in zip(ROWS, plain, moved, strict=True))
    ]
    assert [c.tokens for c in moved[1::3]] != [c.tokens for c in plain[1::3]]


@pytest.mark.parametrize("name", ["Adapted", "HeadLogprobs"])
def test_a_second_derivative_is_refused_and_not_silently_wrong(name):
    x, a, b, w = torch.randn(1, 2, 4, requires_grad=True), torch.randn(2, 4), torch.randn(5, 2), torch.randn(5, 4)
    if name == "Adapted":
        out = Adapted.apply(x, w, a, b, None, (a, b, None), torch.tensor([0]), None, 2.0, True)
    else:
        out, _ = HeadLogprobs.apply(x[0], w, None, torch.tensor([1, 2]), torch.ones(2))
    (slope,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_an_inner_step_has_length_alpha_and_is_zero_without_gradient():
    deltas = {"a": torch.zeros(2, 3, 2), "b": torch.zeros(2, 4, 2)}
    gradients = {n: torch.randn(d.shape) for n, d in deltas.items()}
    for g in gradients.values():
        g[1] = 0
    stepped, norms = normalised_step(deltas, gradients, 0.1)
    length = torch.sqrt(sum(d.pow(2).sum((1, 2)) for d in stepped.values()))
    assert torch.allclose(length, torch.tensor([0.1, 0.0]), atol=1e-6) and norms[1] == 0
    assert all(torch.isfinite(d).all() for d in stepped.values())


def test_an_encoder_decoder_model_loads_and_samples(tmp_path):
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    tokenizer = load_policy(ModelConfig(name="tiny", threads=1)).tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    shape = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), eos_token_id=0, **shape)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = load_policy(ModelConfig(name=str(tmp_path), threads=1), LoraConfig(r=4, alpha=8, top_layers=1))
    assert policy.seq2seq
    completions = run(policy, ROWS[:3])
    assert completions == run(policy, ROWS[:3])
    mixed = run(policy, [*ROWS[:2], Row(2, 52, 2, greedy=True)])
    assert mixed[:2] == completions[:2] and mixed[2].tokens == run(policy, ROWS[:3], temperature=0.0)[2].tokens
    batch = collate(
        policy, [Example(PROMPTS[r.prompt], c.tokens, logprobs=c.logprobs) for r, c in zip(ROWS, completions, strict=False)], 0.8
    )
    fast = FastWeights(policy.model)
    with fast.active():
        scored = [
            score(policy, batch.prompts, batch.tokens, batch.mask, batch.temperature, fast, batch.task, shared=shared)[0]
            for shared in (True, False)
        ]
    assert torch.allclose(scored[0], scored[1], atol=1e-5)
    assert torch.allclose(scored[0][batch.mask > 0], batch.old_logprobs[batch.mask > 0], atol=1e-3)


def test_only_the_last_layers_get_adapters():
    policy = load_policy(ModelConfig(name="tiny", threads=1), LoraConfig(r=2, alpha=4, top_layers=1))
    trained = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    assert trained and all("layers.1." in n for n in trained)


def test_damaged_weights_get_one_clear_error(tiny_policy, tmp_path):
    tiny_policy.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(FalconError, match="does not fit the model"):
        load_policy(ModelConfig(name="tiny"), adapter=tmp_path / "adapter")
    assert first_line(ValueError()) == "ValueError"


@pytest.mark.parametrize("part", ["use_dora", "lora_bias"])
def test_adapters_with_parts_that_the_fast_weights_leave_out_are_refused(tmp_path, part):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **{part: True})
    peft.get_peft_model(tiny_model()[0], config).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(FalconError, match=f"has {part}, which"):
        load_policy(ModelConfig(name="tiny"), adapter=tmp_path)


def test_a_model_without_linear_layers_says_which_ones_to_use(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tiny_model()[1]
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(FalconError, match=r"(?s)GPT2LMHeadModel has no nn.Linear layer.*remedy: use a model"):
        load_policy(ModelConfig(name=str(tmp_path)), LoraConfig())


def test_a_damaged_copy_of_the_embedded_model_says_how_to_make_it_again(monkeypatch, tmp_path):
    monkeypatch.setenv("FALCON_CACHE", str(tmp_path))
    model, tokenizer, _ = tiny_model()
    folder = tmp_path / embedded.NAME
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(FalconError, match=r"(?s)could not be loaded.*delete .*make model"):
        load_policy(ModelConfig(name=embedded.NAME))


def test_a_cache_that_cannot_be_written_is_a_clear_error(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FALCON_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(FalconError, match="point FALCON_CACHE"):
        embedded.ensure()


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), SafetensorError("I/O error"), RuntimeError("unexpected pos")]
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tiny_policy, monkeypatch, tmp_path, failure):
    def fail(*_):
        raise failure

    optimizer = torch.optim.AdamW(tiny_policy.parameters())
    first = checkpoint.save(tmp_path, 1, tiny_policy, optimizer, {})
    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(FalconError, match="cannot write"):
        checkpoint.save(tmp_path, 2, tiny_policy, optimizer, {})
    assert checkpoint.existing(tmp_path) == [first]


def test_bad_input_gets_one_clear_error(tiny_policy, tmp_path):
    with pytest.raises(FalconError, match="prompt is empty"):
        generate(tiny_policy, ["x", ""], [Row(0, 0)], max_new_tokens=4, temperature=1.0)
    with pytest.raises(FalconError, match="context holds"):
        generate(tiny_policy, ["word " * 3000], [Row(0, 0)], max_new_tokens=4, temperature=1.0)
    with pytest.raises(FalconError, match="could not be loaded"):
        load_policy(ModelConfig(name=str(tmp_path)))
    with pytest.raises(FalconError, match="no adapter"):
        load_policy(ModelConfig(name="tiny"), adapter=tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(FalconError, match="no GPU"):
            resolve_device("cuda")
