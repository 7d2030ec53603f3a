"""Which of Transformers' common tests do not hold for this package's classes, and why."""

_STRICT = "loading is strict: weights that are missing are an error, and none is ever left random"

DECLINED: dict[str, str] = {
    "test_base_model_prefix_loads_base_weights": _STRICT,
    "test_correct_missing_keys": _STRICT,
    "test_model_weights_reload_no_missing_tied_weights": _STRICT,
    "test_generation_tester_mixin_inheritance": "the tests of generation are not in Transformers' source distribution;"
    " `modeling_tests/test_generation_common.py` has ours",
    "test_init_arguments_not_in_processor_kwargs": "a checkpoint says how many frames of a video are sampled, and a call"
    " may say otherwise; other processors keep such a default in a video processor, which LongLLaVA has none of",
}

# Those that older releases of Transformers do not have yet.
NEW = {"test_base_model_prefix_loads_base_weights", "test_init_arguments_not_in_processor_kwargs"}
