"""The options: every message, every default, and saving and loading in a `GenerationConfig` file."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from hf_flashdlm import DiffusionOptions
from hf_flashdlm.generation_config import (
    BLOCKS,
    CONFIDENCES,
    METHOD_OPTIONS,
    PEER_NAMES,
    RULES,
    SCHEDULES,
    WINDOW_POLICIES,
)
from hf_flashdlm.methods import METHODS


COUNTS = (
    *("block_length", "steps", "freeze_length", "right_window", "refresh_blocks", "refresh_steps"),
    "delimiter_window",
)
FROM_ZERO = ("freeze_lag", "left_margin", "mask_token_id")
NUMBERS = ("position_temperature", "factor", "entropy_bound", "refresh_entropy")
SHARES = ("eps", "confidence_threshold", "frechet_delta")


def refused(message, **options):
    with pytest.raises(ValueError, match=message):
        DiffusionOptions(**options)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True])
def test_a_count_is_a_positive_integer(name, value):
    refused(rf"^`{name}` must be an integer of at least 1, got {value!r}\.$", **{name: value})


@pytest.mark.parametrize("name", FROM_ZERO)
@pytest.mark.parametrize("value", [-1, 0.5, "0", False])
def test_a_length_or_an_id_is_an_integer_from_zero_on(name, value):
    refused(rf"^`{name}` must be an integer of at least 0, got {value!r}\.$", **{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-0.1, "1", True, float("nan")])
def test_a_measure_is_a_number_from_zero_on(name, value):
    refused(rf"^`{name}` must be a number of at least 0, got {value!r}\.$", **{name: value})


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("value", [1.1, 2, "0.9", True])
def test_a_share_is_a_number_between_zero_and_one(name, value):
    refused(rf"^`{name}` must be a number .*, got {value!r}\.$", **{name: value})


@pytest.mark.parametrize("name", SHARES)
def test_the_limits_of_a_share_are_said(name):
    refused(rf"^`{name}` must be a number between 0 and 1, got 1\.5\.$", **{name: 1.5})


@pytest.mark.parametrize(
    "name",
    [
        *("run_empty_steps", "attend_stale", "grow_canvas", "synchronize_blocks", "stop_at_eos"),
        *("output_confidence", "output_history"),
    ],
)
@pytest.mark.parametrize("value", ["no", 2])
def test_a_switch_is_true_or_false(name, value):
    fitting = {"steps": 64, "schedule": "timesteps"} if name == "run_empty_steps" else {}
    refused(f"`{name}` must be", **fitting, **{name: value})


@pytest.mark.parametrize(
    ("name", "choices", "protocol"),
    [
        ("window_policy", WINDOW_POLICIES, "WindowPolicy"),
        ("confidence", CONFIDENCES, "Confidence"),
        ("schedule", SCHEDULES, "Schedule"),
        ("blocks", BLOCKS, "BlockPolicy"),
    ],
)
@pytest.mark.parametrize("value", ["nonsense", None, 1])
def test_a_choice_is_one_of_those_listed_or_an_object(name, choices, protocol, value):
    if name == "schedule" and value is None:
        return  # the default: none
    listed = ", ".join(choices)
    refused(
        rf"^`{name}` must be one of {listed}, or an object that follows `{protocol}`, got {value!r}\.$",
        **{name: value},
    )


def test_a_method_is_one_of_those_listed():
    refused(rf"^`method` must be one of {', '.join(METHODS)}, got 'nonsense'\.$", method="nonsense")


@pytest.mark.parametrize("rule", RULES)
def test_steps_and_a_rule_exclude_each_other(rule):
    refused(
        rf"`steps` fixes .* and `{rule}` leaves it open, got steps=8 and {rule}=0\.5: pass one", steps=8, **{rule: 0.5}
    )


@pytest.mark.parametrize(("first", "second"), [(one, two) for at, one in enumerate(RULES) for two in RULES[at + 1 :]])
def test_two_rules_exclude_each_other(first, second):
    refused(f"`{first}` and `{second}` are rules for the same thing: pass one", **{first: 0.5, second: 0.5})


@pytest.mark.parametrize("options", [{}, {"steps": 64}, {"steps": 64, "schedule": "uniform"}])
def test_empty_steps_belong_to_the_timesteps(options):
    schedule = options.get("schedule")
    refused(
        rf"^`run_empty_steps` belongs to schedule='timesteps', got schedule={schedule!r}: drop it\.$",
        run_empty_steps=True,
        **options,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"confidence": "margin"},
            "must be 'probability' for `confidence_threshold`, got 'margin': drop it, or pass `steps` or an",
        ),
        ({"confidence": "entropy", "factor": 1.0}, "must be 'probability' for `factor`, got 'entropy'"),
        ({"confidence": "margin", "entropy_bound": 1.0}, "must be 'entropy' for `entropy_bound`, got 'margin'"),
    ],
)
def test_a_rule_is_about_one_measure_of_confidence(options, message):
    refused(f"^`confidence` {message}", **options)


@pytest.mark.parametrize(
    ("name", "value", "policies"),
    [
        ("freeze_length", 8, ["freecache"]),
        ("freeze_lag", 0, ["freecache"]),
        ("left_margin", 1, ["freecache"]),
        ("right_window", 8, ["freecache"]),
        ("attend_stale", True, ["freecache"]),
        ("refresh_blocks", 2, ["freecache"]),
        ("refresh_entropy", 1.0, ["freecache"]),
        ("grow_canvas", True, ["freecache", "none"]),
        ("refresh_steps", 4, ["dkv"]),
    ],
)
@pytest.mark.parametrize("policy", WINDOW_POLICIES)
def test_an_option_of_another_window_policy_is_refused(name, value, policies, policy):
    options = {name: value, "window_policy": policy}
    if policy in policies:
        assert getattr(DiffusionOptions(**options), name) == value
    else:
        belongs = " or ".join(map(repr, policies))
        refused(rf"^`{name}` belongs to window_policy={belongs}, got {value} with '{policy}': drop it\.$", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 8, "confidence": "margin", "schedule": "timesteps", "run_empty_steps": True, "eps": 0},
        {"entropy_bound": 0.5},
        {"entropy_bound": 0.5, "confidence": "entropy"},
        {"factor": 2, "position_temperature": 0.5},
        {"frechet_delta": 0},
        {"confidence_threshold": 1, "mask_token_id": 0},
    ],
)
def test_what_fits_together_is_accepted(options):
    assert all(getattr(DiffusionOptions(**options), name) == value for name, value in options.items())


def test_the_defaults_are_freecache_with_a_lag_of_one_and_a_stop_at_the_end():
    options = DiffusionOptions()
    assert (options.window_policy, options.freeze_lag, options.stop_at_eos) == ("freecache", 1, True)
    assert (options.confidence, options.blocks, options.eps) == ("probability", "fixed", 1e-3)
    unset = [name for name in DiffusionOptions.names() if getattr(options, name) is None]
    assert {"block_length", "steps", "right_window", "mask_token_id", *RULES} <= set(unset)


# Blocks


@pytest.mark.parametrize(
    ("options", "max_new_tokens", "expected"),
    [
        ({}, 64, (32, 2)),
        ({}, 10, (10, 1)),  # shorter than the default
        ({"block_length": 4}, 10, (4, 3)),  # the last is cut
        ({"block_length": 4, "steps": 3}, 10, (4, 3)),
    ],
)
def test_blocks_tile_the_region(options, max_new_tokens, expected):
    assert DiffusionOptions(**options).tiling(max_new_tokens) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"block_length": 11},
            r"`block_length` must be at most `max_new_tokens`=10, got 11: lower it, or generate more",
        ),
        (
            {"block_length": 4, "steps": 2},
            r"`steps` must give each of the 3 blocks of 4 tokens at least one step, got 2: raise it, or raise",
        ),
    ],
)
def test_blocks_that_do_not_fit_the_region_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionOptions(**options).tiling(10)


@given(st.integers(1, 100), st.integers(1, 100))
def test_blocks_cover_the_region_and_the_last_is_not_empty(block_length, max_new_tokens):
    length, count = DiffusionOptions(block_length=min(block_length, max_new_tokens)).tiling(max_new_tokens)
    assert (count - 1) * length < max_new_tokens <= count * length


# Files and words


OTHER_THAN_DEFAULT = [
    {"block_length": 8, "confidence_threshold": 0.8, "left_margin": 1, "right_window": 4, "attend_stale": True},
    {"steps": 8, "schedule": "timesteps", "eps": 0.01, "run_empty_steps": True, "confidence": "random"},
    {"window_policy": "dkv", "refresh_steps": 4, "factor": 1.5, "stop_at_eos": False, "mask_token_id": 7},
    {"freeze_length": 2, "freeze_lag": 0, "grow_canvas": True, "refresh_blocks": 2, "refresh_entropy": 1.0},
    {"entropy_bound": 0.5, "position_temperature": 0.5, "synchronize_blocks": True, "window_policy": "none"},
    {"frechet_delta": 0.5, "output_confidence": True, "output_history": True},
    {"method": "fast-dllm-dual"},
    {"steps_per_block": 4, "editing_threshold": 0.5, "max_post_steps": 3, "first_token_alone": True},
    {"blocks": "adaptive", "delimiter_token_ids": [3], "delimiter_threshold": 0.5, "delimiter_window": 8},
    {"schedule": "shift", "schedule_shift": 0.5, "prefix_lm": True, "prompt_tail": 2},
]


def test_the_next_test_sets_every_option_to_something_else():
    defaults = DiffusionOptions()
    named = {name for options in OTHER_THAN_DEFAULT for name in options}
    assert named == set(DiffusionOptions.names()) - {"unmasking_rule"}, "which is an object"
    assert all(getattr(defaults, name) != value for options in OTHER_THAN_DEFAULT for name, value in options.items())


@pytest.mark.parametrize("options", OTHER_THAN_DEFAULT)
def test_options_survive_a_generation_config_file(tmp_path, options):
    config = GenerationConfig()
    for name, value in options.items():
        setattr(config, name, value)
    config.save_pretrained(tmp_path)
    settings = METHODS.get(options.get("method"), {})
    assert DiffusionOptions.read(GenerationConfig.from_pretrained(tmp_path)) == DiffusionOptions(**settings, **options)


def test_a_generation_config_without_our_options_gives_the_defaults():
    assert DiffusionOptions.read(GenerationConfig()) == DiffusionOptions()


def test_options_read_from_a_generation_config_are_checked():
    config = GenerationConfig()
    config.block_length = -3
    with pytest.raises(ValueError, match="`block_length` must be an integer of at least 1, got -3"):
        DiffusionOptions.read(config)


@pytest.mark.parametrize("name", DiffusionOptions.names())
def test_an_option_is_documented_with_its_default(name):
    assert f"\n        {name} (" in DiffusionOptions.__doc__
    default = getattr(DiffusionOptions(), name)
    line = next(line for line in DiffusionOptions.__doc__.splitlines() if line.startswith(f"        {name} ("))
    if default is None:
        assert "defaults to" not in line
    else:
        said = line.split("defaults to ")[1].split(")")[0].strip("`").strip('"')
        assert said == ("1e-3" if default == 1e-3 else str(default))


def test_no_option_clashes_with_one_of_transformers():
    assert not set(DiffusionOptions.names()) & set(vars(GenerationConfig()))


def test_the_names_of_other_implementations_are_none_of_ours():
    assert not set(PEER_NAMES) & set(DiffusionOptions.names())


# Named methods


@pytest.mark.parametrize("name", METHODS)
def test_a_method_sets_only_what_makes_a_method(name):
    assert set(METHODS[name]) <= {*METHOD_OPTIONS, "block_length"}
    DiffusionOptions(method=name, **METHODS[name] | ({"delimiter_token_ids": 3} if name == "adablock" else {}))


def test_a_method_of_a_config_fills_in_what_the_config_leaves_open():
    config = GenerationConfig()
    config.method, config.confidence_threshold = "fast-dllm-dual", 0.5
    options = DiffusionOptions.read(config)
    assert (options.window_policy, options.confidence_threshold) == ("dual", 0.5)


def test_a_method_as_a_keyword_replaces_all_options_that_make_one():
    keywords = DiffusionOptions.expand({"method": "llada", "steps": 8})
    assert set(METHOD_OPTIONS) <= set(keywords)
    assert keywords["steps"] == 8 and keywords["schedule"] == "uniform" and keywords["confidence_threshold"] is None
    assert DiffusionOptions.expand({"steps": 8}) == {"steps": 8}
