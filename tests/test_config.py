"""Settings: what a wrong one gets, before anything runs."""

import pytest

from falconlib.config import ABOVE_ZERO, AT_LEAST, AT_MOST, CHOICES, load_profile, profiles_dir
from falconlib.errors import FalconError

PROFILES = sorted(p.stem for p in profiles_dir().glob("*.yaml"))


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_loads(name):
    assert load_profile(name).name == name


def test_every_profile_of_the_house_is_there():
    assert PROFILES == ["colab", "paper", "paper-apps", "quick", "small", "small-cpu", "smoke"]


@pytest.mark.parametrize("name", ["../profiles/smoke", "smoke.yaml", "", 3])
def test_a_profile_is_one_of_the_files(name):
    with pytest.raises(FalconError, match="unknown profile"):
        load_profile(name)


@pytest.mark.parametrize(
    "setting, value",
    [
        *((name, least - 1) for name, least in AT_LEAST.items()),
        *((name, 2 * most) for name, most in AT_MOST.items()),
        *((name, 0.0) for name in ABOVE_ZERO),
        *((name, "foo") for name in CHOICES),
        *(("train.lr", v) for v in (0.0, float("nan"), float("inf"))),
        *(("inner.support", v) for v in (1, 3)),
        *(("seeds", v) for v in ([], [0, 0], [-1], [2**32])),
        *(("arms", v) for v in (["rtf"], [], ["grpo", "grpo"])),
        *((f"tasks.{name}", v) for name in ("train", "benchmarks") for v in ([], ["basics", "basics"])),
        *((name, ["falcom"]) for name in ("ablations", "eval.ltm_arms")),
        *((name, 1) for name in ("name", "train", "train.stepz", "nonsense.deep.name")),
        *(("train.steps", v) for v in ("5", 5.5, True, None)),
        *(("long_term.enabled", v) for v in ("true", 1)),
    ],
)
def test_a_bad_setting_is_one_clear_error(setting, value):
    with pytest.raises(FalconError) as caught:
        load_profile("smoke", {setting: value})
    assert (caught.value.remedy and setting.split(".")[0] in caught.value.message) or "arm" in caught.value.message


def test_settings_reach_their_place():
    profile = load_profile("smoke", {"train.steps": 7, "train.lr": 1, "seeds": [3, 4], "inner.steps": 0, "inner.support": 1})
    assert (profile.train.steps, profile.train.lr, profile.seeds) == (7, 1.0, (3, 4))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("train.steps", True, "parameter train.steps = true: a whole number is expected\n  remedy: --set train.steps=5"),
        ("train.steps", None, "parameter train.steps = null: a whole number is expected"),
        ("model.name", 7, "parameter model.name = 7: a text is expected"),
        ("seeds", "01", 'parameter seeds = "01": a list of whole numbers is expected'),
        ("seeds", (0, 0), "parameter seeds = [0, 0]: at least one seed, each once, from 0 to 4294967295 is expected"),
        ("arms", 3, "parameter arms = 3: a list of texts is expected"),
        ("judge.replay", True, "parameter judge.replay = true: only with a judge.cache"),
        ("train", [1], "parameter train is a group of settings, not [1]"),
    ],
)
def test_messages_speak_of_values_and_not_of_types(setting, value, message):
    with pytest.raises(FalconError) as caught:
        load_profile("smoke", {setting: value})
    assert message in str(caught.value) and not any(word in str(caught.value) for word in ("int", "tuple", "None", "True"))
