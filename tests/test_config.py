"""The configuration tree: overrides, the saved file, and every refusal with its sentence."""

import dataclasses
import json
import tempfile
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config, ConfigError, ModelConfig, TaskConfig, apply_overrides, check
from megatron_sdpo.hf_config import check_model, read_model_config

BASE = Config(
    name="run", run_dir="runs/run", steps=4, model=ModelConfig(path="model"), task=TaskConfig(name="minipipe")
)
MODEL = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "intermediate_size": 264,
    "num_hidden_layers": 4,
    "max_position_embeddings": 8192,
}


def value_of(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def values(kind: Any) -> st.SearchStrategy[Any]:
    """JSON values that fit a leaf's type."""
    if typing.get_origin(kind) is dict:
        return st.dictionaries(st.text(min_size=1), st.none() | st.booleans() | st.integers() | st.text())
    if kind is int:
        return st.integers(-(2**53), 2**53)
    if kind is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    if type(None) in typing.get_args(kind):
        return st.none() | st.one_of(*(values(part) for part in typing.get_args(kind) if part is not type(None)))
    return st.from_type(kind)


LEAVES = {key: kind for key, (kind, _) in configuration.fields_by_name().items()}
ASSIGNMENTS = st.fixed_dictionaries({}, optional={key: values(kind) for key, kind in LEAVES.items()})


@settings(max_examples=60, deadline=None)
@given(ASSIGNMENTS)
def test_overrides_set_exactly_what_they_name_and_survive_the_file(assignments: dict[str, Any]) -> None:
    config = apply_overrides(BASE, [f"{key}={json.dumps(value)}" for key, value in assignments.items()])
    for key in LEAVES:
        assert value_of(config, key) == assignments.get(key, value_of(BASE, key))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        configuration.save(config, path)
        assert configuration.load(path) == config
        assert [p.name for p in Path(folder).iterdir()] == ["config.json"]


def test_overrides_read_plain_words() -> None:
    overrides = ["optim.lr=1e-3", "objective.policy_drift_clip=none", "name=7", "task.options.hint=false"]
    config = apply_overrides(BASE, [*overrides, "task.options.ranks=[1, 2]", "objective.kind=grpo", "name=a=b"])
    assert config.optim.lr == 1e-3
    assert config.objective.policy_drift_clip is None
    assert config.objective.kind == "grpo"
    assert config.task.options == {"hint": False, "ranks": [1, 2]}
    assert config.name == "a=b"
    assert BASE.task.options == {}


def test_a_choice_may_be_called_none() -> None:
    full = apply_overrides(BASE, ["layout.recompute=full"])
    assert apply_overrides(full, ["layout.recompute=none"]).layout.recompute == "none"
    with pytest.raises(ConfigError, match="must be a whole number"):
        apply_overrides(full, ["steps=none"])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.lr", "has no '='"),
        ("optim.learning_rate=1", "unknown configuration key 'optim.learning_rate'"),
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("zzzz=1", "lists the keys"),
        ("optim=1", "unknown configuration key 'optim'"),
        ("task.options.=1", "unknown configuration key 'task.options.'"),
        ("steps=many", "steps='many' does not fit: it must be a whole number"),
        ("steps=1.5", "it must be a whole number"),
        ("optim.lr=fast", "it must be a number"),
        ("teacher_context.demonstrations=2", "it must be true or false"),
        ("objective.kind=ppo", "it must be one of sdpo, grpo, next_token"),
        ("objective.dual_clip=no", "it must be a number or none"),
        ("engine.extra_args=--flag", "it must be a JSON list"),
        ("task.options=7", "it must be a JSON object"),
        ("optim.lr=NaN", "numbers must be finite"),
        ("optim.lr=-Infinity", "numbers must be finite"),
        ("optim.lr=1e999", "numbers must be finite"),
        ("optim.lr=" + "9" * 400, "does not fit"),
        ("optim.lr=" + "9" * 5000, "it must be a number"),
        ("optim.lr=" + "[" * 100_000, "it must be a number"),
        ("objective.dual_clip=NaN", "numbers must be finite"),
        ('task.options.weights=[1, {"a": NaN}]', "numbers must be finite"),
    ],
)
def test_an_override_that_cannot_be_taken_is_refused(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        apply_overrides(BASE, [override])
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot read the configuration"),
        ("{", "is not JSON"),
        ('{"stepz": 4}', "unknown configuration key 'stepz'"),
        ('{"optim": {"lrr": 4}}', "unknown configuration key 'optim.lrr'"),
        ('{"steps": "many"}', "steps='many' does not fit"),
        ('{"name": "run"}', "the configuration is not complete"),
        ("[]", "the configuration is '[]'; it must be a JSON object"),
        ("7", "the configuration is '7'; it must be a JSON object"),
        ('{"model": 3}', "the section 'model' is '3'; it must be a JSON object"),
        ('{"model": {"path": null}}', "model.path=None does not fit: it must be text"),
        ('{"name": 7}', "name=7 does not fit: it must be text"),
        ('{"optim": {"lr": NaN}}', "numbers must be finite"),
        ("\udcff", "is not text"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_refused(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError) as error:
        configuration.load(path)
    assert sentence in str(error.value) and str(path) in str(error.value)


POSITIVE = (
    "steps",
    "layout.tensor_parallel",
    "layout.pipeline_parallel",
    "layout.world_size",
    "layout.tokens_per_micro_batch",
    "layout.head_chunk_tokens",
    "layout.overlap_bucket_elements",
    "layout.virtual_pipeline",
    "layout.context_parallel",
    "layout.recompute_num_layers",
    "layout.expert_parallel",
    "layout.expert_tensor_parallel",
    "engine.count",
    "rollout.prompts_per_step",
    "rollout.attempts_per_prompt",
    "rollout.max_new_tokens",
    "optim.mini_batches",
    "objective.top_k",
    "checkpoint.every",
    "checkpoint.keep",
    "publish.bucket_bytes",
    "model.max_length",
    "engine.tensor_parallel",
    "engine.max_running_requests",
    "engine.max_total_tokens",
    "rollout.verify_workers",
    "teacher_context.max_prompt_tokens",
    "evaluation.attempts",
    "evaluation.questions",
    "guard.reward_window",
    "guard.accuracy_window",
    "spikes.window",
    "spikes.patience",
    "ranks.slow_steps",
)


@pytest.mark.parametrize("key", POSITIVE)
def test_sizes_must_be_positive(key: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(apply_overrides(BASE, [f"{key}=0"]))
    assert str(error.value) == f"{key} is 0; it must be at least 1"


_TP2 = ("layout.tensor_parallel=2", "layout.world_size=2")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["layout.tensor_parallel=2"], "layout.world_size 1 is not a multiple"),
        (["layout.pipeline_parallel=2", "layout.world_size=3"], "set it to 2 or a multiple"),
        (["layout.context_parallel=2"], "tensor_parallel * pipeline_parallel * context_parallel = 2; set it to 2 or a"),
        (["layout.sequence_parallel=true"], "layout.tensor_parallel is 1; set it to 2 or more, or layout.sequence"),
        (
            ["layout.virtual_pipeline=2"],
            "layout.pipeline_parallel is 1; set it to 2 or more, or layout.virtual_pipeline=1",
        ),
        (["layout.expert_parallel=2"], "layout.expert_parallel 2 does not divide the 1 ranks of a pipeline stage; set"),
        (
            [*_TP2, "layout.expert_parallel=2"],
            "2 with 2 slices of each expert does not divide the 2 ranks of a pipeline stage; set layout.world_size to a"
            " multiple of 4",
        ),
        (
            [*_TP2, "layout.expert_parallel=2", "layout.expert_tensor_parallel=1"],
            "they all have the same tokens; set layout.sequence_parallel=true",
        ),
        (
            [*_TP2, "layout.sequence_parallel=true", "layout.expert_tensor_parallel=1"],
            "layout.expert_parallel is 1; set layout.expert_parallel=2, or layout.expert_tensor_parallel=none",
        ),
        (["layout.world_size=2", "layout.expert_tensor_parallel=2"], "must be 1 or layout.tensor_parallel 1"),
        (["layout.overlap_param_gather=true"], "set layout.distributed_optimizer=true and layout.overlap_grad_reduce"),
        (
            ["layout.recompute_method=block"],
            "is for layout.recompute=full, but that is none; set layout.recompute=full",
        ),
        (
            ["layout.recompute=selective", "layout.recompute_num_layers=2"],
            "layout.recompute_num_layers is for layout.rec",
        ),
        (["layout.recompute=full", 'layout.recompute_modules=["mlp"]'], "is for layout.recompute=selective"),
        (["layout.recompute=selective", "layout.recompute_modules=[]"], "name one or more parts, each once"),
        (["layout.recompute=selective", 'layout.recompute_modules=["mlp","mlp"]'], "name one or more parts, each once"),
        (["layout.recompute=full", "layout.distribute_saved_activations=true"], "layout.tensor_parallel 1 has nobody"),
        (
            [
                *("layout.recompute=full", "layout.distribute_saved_activations=true", "layout.sequence_parallel=true"),
                *("layout.tensor_parallel=2", "layout.world_size=2"),
            ],
            "layout.sequence_parallel divides them already",
        ),
        (["objective.alpha=1.1"], "objective.alpha is 1.1; it must lie between 0 and 1"),
        (["objective.alpha=-0.1"], "objective.alpha is -0.1"),
        (["teacher.update_rate=2"], "teacher.update_rate is 2"),
        (["rollout.temperature=0"], "set it above 0"),
        (["evaluation.top_p=0"], "evaluation.top_p is 0.0; set it above 0"),
        (["evaluation.top_p=1.5"], "evaluation.top_p is 1.5; it must lie between 0 and 1"),
        (["rollout.max_staleness=-1"], "rollout.max_staleness is -1; it must be at least 0"),
        (["evaluation.every=-1"], "evaluation.every is -1; it must be at least 0"),
        (["publish.probe_tokens=1"], "publish.probe_tokens is 1; it must be at least 2"),
        (["optim.min_lr_ratio=1.5"], "optim.min_lr_ratio is 1.5; it must lie between 0 and 1"),
        (["engine.request_timeout_s=0"], "engine.request_timeout_s is 0.0; set it above 0"),
        (["engine.port=65535"], "engine.port is 65535; it and the 1 after it must be below 65536"),
        (["engine.max_total_tokens=100"], "cannot hold one sequence of model.max_length 8192"),
        (["run_dir="], "run_dir is empty; set it"),
        (["model.path="], "model.path is empty; set it"),
        (["objective.kind=grpo", "rollout.attempts_per_prompt=1"], "set rollout.attempts_per_prompt to 2 or more"),
        (["objective.grpo_share=2"], "objective.grpo_share is 2.0; it must lie between 0 and 1"),
        (["objective.stop_at_saturation=1.5"], "objective.stop_at_saturation is 1.5; a success rate is at most 1"),
        (["objective.sample_weighting=failed_only", "objective.kind=grpo"], "kind grpo has none"),
        (["objective.sample_weighting=question_difficulty", "objective.kind=next_token"], "no rewards to weigh by"),
        (["objective.sample_weighting=question_difficulty", "rollout.attempts_per_prompt=1"], "several attempts"),
        (["objective.advantage_clip=5"], "advantages of KL(student||teacher), but objective.alpha is 0.5"),
        (["objective.advantage_clip=0", "objective.alpha=1"], "objective.advantage_clip is 0.0; set it above 0"),
        (["objective.credit=sequence"], "cannot be had at objective.support=top_k; set objective.support=sampled"),
        (["objective.credit=token", "objective.support=sampled", "objective.alpha=1"], "set objective.support=top_k"),
        (["objective.top_k=1", "objective.tail=false"], "of which there is one: student and teacher then always agree"),
        (["objective.credit=token", "objective.tail=false"], "of which there is one: student and teacher then always"),
        (["teacher_context.feedback=never", "teacher_context.demonstrations=false"], "demonstrations=false shows no"),
        (["teacher_context.feedback=never", "rollout.attempts_per_prompt=1"], "its one attempt has no sibling: it"),
        (["objective.kl_coefficient=0.1"], "part of GRPO's loss, which kind sdpo has not"),
        (["teacher.mixture=1.5"], "teacher.mixture is 1.5; it must lie between 0 and 1"),
        (["teacher.kind=frozen", "teacher.update_every=optimizer_step"], "kind frozen is never updated"),
        (["steps=5", "debug.profile_steps=[4,5]"], "debug.profile_steps names 5, but with steps 5 there are 0 to 4"),
        (
            ["debug.profile_steps=[0]", "debug.profile_ranks=[1]"],
            "names 1, but with layout.world_size 1 there are 0 to 0",
        ),
        (["debug.profile_steps=[0]", "debug.profile_ranks=[]"], "debug.profile_ranks is empty; leave debug.profile_st"),
        (["debug.profile_steps=[0]", "debug.rollout_only=true", "evaluation.every=0"], "rollout_only has no trainer"),
        (["teacher.kind=live", "teacher.placement=offloaded"], "places weights that a teacher of kind live has not"),
        (["objective.support=vocabulary", "teacher.kind=trust_region"], "of which objective.support=vocabulary"),
        (["objective.support=sampled"], "but objective.alpha is 0.5; set objective.alpha=1"),
        (["guard.drop=1.5"], "guard.drop is 1.5; it must lie between 0 and 1"),
        (["guard.damping=-0.1"], "guard.damping is -0.1; it must lie between 0 and 1"),
        (["ranks.timeout_s=0"], "ranks.timeout_s is 0.0; set it above 0"),
        (["ranks.slow_share=0"], "ranks.slow_share is 0.0; set it above 0"),
        (["spikes.factor=1"], "spikes.factor is 1; it multiplies a usual norm, set it above 1"),
        (["guard.signal=accuracy", "evaluation.every=0"], "set evaluation.every to 1 or more"),
        (["guard.signal=both", "objective.kind=next_token"], "watches rewards, which kind next_token has not"),
        (["deterministic=true", "rollout.max_staleness=1"], "set rollout.max_staleness=0 or deterministic=false"),
        (["engine.release_memory=true", "rollout.max_staleness=1"], "so they sample then; set rollout.max_staleness=0"),
        (["engine.release_memory=true"], "publish.backend=auto does not reach; set publish.backend=ipc"),
        (["checkpoint.keep_every=15"], "checkpoint.keep_every 15 is not a multiple of checkpoint.every 10"),
        (["checkpoint.keep_every=0"], "checkpoint.keep_every is 0; it must be at least 1"),
        (["teacher_context.demonstration=random", "teacher_context.demonstrations=false"], "set the one to first"),
        (["teacher_context.too_long=shorten_feedback", "teacher_context.feedback=never"], "a section that is never"),
        (["teacher_context.too_long=shorten_demonstration", "teacher_context.demonstrations=false"], "to shorten or"),
    ],
)
def test_values_that_cannot_work_are_refused(overrides: Sequence[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(apply_overrides(BASE, overrides))
    assert sentence in str(error.value)


def test_values_that_work_are_accepted() -> None:
    check(BASE)
    check(apply_overrides(BASE, ["layout.tensor_parallel=2", "layout.pipeline_parallel=2", "layout.world_size=8"]))
    check(apply_overrides(BASE, ["objective.alpha=1", "teacher.update_rate=0"]))
    check(apply_overrides(BASE, ["checkpoint.keep_every=20", "deterministic=true"]))
    check_model(BASE, MODEL)
    layout = ["layout.tensor_parallel=2", "layout.pipeline_parallel=4", "layout.world_size=8"]
    check_model(apply_overrides(BASE, layout), MODEL)
    check_model(apply_overrides(BASE, layout), MODEL | {"vocab_size": 511})  # padded
    whole = ["layout.sequence_parallel=true", "layout.expert_parallel=2", "layout.expert_tensor_parallel=1"]
    check(apply_overrides(BASE, [*_TP2, *whole]))
    check_model(apply_overrides(BASE, [*_TP2, *whole]), MODEL | {"num_experts": 4, "moe_intermediate_size": 7})


@pytest.mark.parametrize(
    ("override", "model", "sentence"),
    [
        ("layout.tensor_parallel=3", {}, "does not divide the model's 4 attention heads"),
        ("layout.tensor_parallel=4", {}, "does not divide the model's 2 key-value heads"),
        ("layout.tensor_parallel=2", {"intermediate_size": 265}, "does not divide the model's 265 MLP units"),
        ("layout.pipeline_parallel=3", {}, "does not divide the model's 4 layers"),
        ("layout.virtual_pipeline=3", {}, "times layout.virtual_pipeline 3 does not divide the model's 4 layers"),
        ("layout.expert_parallel=2", {}, "but the model is dense; set layout.expert_parallel=1"),
        ("layout.expert_tensor_parallel=2", {}, "but the model is dense; set layout.expert_tensor_parallel=none"),
        ("layout.expert_parallel=3", {"num_experts": 4}, "does not divide the model's 4 experts; set a divisor of 4"),
        ("objective.top_k=512", {}, "objective.top_k 512 must be smaller than the vocabulary of 512"),
        ("model.max_length=8193", {}, "is beyond the model's 8192 positions"),
    ],
)
def test_a_layout_that_does_not_fit_the_model_is_refused(override: str, model: dict[str, int], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_model(apply_overrides(BASE, [override]), MODEL | model)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "model", "sentence"),
    [
        (["recompute=full", "recompute_num_layers=3"], {}, "does not fit the 4 layers of a pipeline stage"),
        (["recompute=full", "recompute_num_layers=5", "recompute_method=block"], {}, "set 4 or fewer"),
        (["recompute=full", "recompute_num_layers=4", "pipeline_parallel=2"], {}, "set a divisor of 2"),
        (["recompute=selective", 'recompute_modules=["moe","mlp"]'], {}, "names moe, but the model has no experts"),
        (["recompute=selective", 'recompute_modules=["mlp"]'], {"num_experts": 4}, "the model has experts in every"),
        (
            ["recompute=full", "distribute_saved_activations=true", "tensor_parallel=2"],
            {"hidden_size": 129},
            "into 2 equal parts, which is impossible",
        ),
    ],
)
def test_recomputing_what_the_model_has_not_is_refused(
    overrides: Sequence[str], model: dict[str, int], sentence: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_model(apply_overrides(BASE, [f"layout.{override}" for override in overrides]), MODEL | model)
    assert sentence in str(error.value)


@pytest.mark.parametrize("override", ["kind=grpo", "kind=next_token", "support=vocabulary", "credit=token"])
def test_the_kept_tokens_are_checked_where_tokens_are_kept(override: str) -> None:
    check_model(apply_overrides(BASE, ["objective.top_k=512", f"objective.{override}"]), MODEL)


def test_a_model_without_key_value_heads_has_as_many_as_attention_heads() -> None:
    model = {key: size for key, size in MODEL.items() if key != "num_key_value_heads"}
    check_model(apply_overrides(BASE, ["layout.tensor_parallel=4"]), model)


def test_an_incomplete_model_directory_is_refused_until_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    config = apply_overrides(BASE, [f"model.path={folder}"])

    def refusal() -> str:
        with pytest.raises(ConfigError) as error:
            read_model_config(config)
        return str(error.value)

    assert "is not a directory" in refusal()
    folder.mkdir()
    assert "has no config.json" in refusal()
    written = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "rms_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(MODEL | written | {"hidden_act": "silu"}))
    assert "has no tokenizer.json" in refusal()
    (folder / "tokenizer.json").write_text("{}")
    assert "has no *.safetensors file" in refusal()
    (folder / "model.safetensors").touch()
    model = read_model_config(config)
    assert (model["num_attention_heads"], model["head_dim"], model["tie_word_embeddings"]) == (4, 16, False)


def test_the_leaves_cover_the_whole_tree() -> None:
    leaves = configuration.fields_by_name()
    assert leaves["optim.lr"] == (float, 1e-5)
    assert {key for key, (_, default) in leaves.items() if default is dataclasses.MISSING} == {
        "name",
        "run_dir",
        "steps",
        "model.path",
        "task.name",
    }


@pytest.mark.parametrize("text", ["{", "[]", "7"])
def test_a_damaged_model_configuration_is_refused(tmp_path: Path, text: str) -> None:
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model_config(apply_overrides(BASE, [f"model.path={tmp_path}"]))
