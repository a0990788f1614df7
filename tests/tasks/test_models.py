"""Loading: what is refused, what is seeded, and that compression never holds the model at full precision."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.cell import ModelSpec
from tasks.models.identity import POCKET, ModelError, checkpoint_hash, config_of, random_config, refuse_unsafe
from tasks.optimization import LoadOptions
from tasks.supervisor import Supervisor


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of pocket, without its texts."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in POCKET.iterdir():
        if path.is_file():
            shutil.copy(path, folder / path.name)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load(spec: ModelSpec, **options: Any) -> Any:
    import torch

    from tasks.models.load import load

    return load(spec, LoadOptions(**options), torch.device("cpu"), ())


def path_spec(folder: Path, **changes: Any) -> ModelSpec:
    return ModelSpec(**{"id": "mine", "source": "path", "reference": str(folder), "kind": "language", **changes})


class TestHostileCheckpoints:
    def test_copy_is_accepted(self, checkpoint: Path) -> None:
        loaded = load(path_spec(checkpoint))
        assert loaded.weights == "trained"
        assert loaded.tokenizer is not None

    def test_pickle_only(self, checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
        with pytest.raises(ModelError, match=r"pytorch_model\.bin, which can run code.*save_pretrained"):
            load(path_spec(checkpoint))

    def test_pickle_beside_safetensors_is_not_read(self, checkpoint: Path) -> None:
        (checkpoint / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
        load(path_spec(checkpoint))
        assert not (Path.cwd() / "pwned").exists()

    def test_nothing_at_all(self, checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").unlink()
        with pytest.raises(ModelError, match="none found"):
            load(path_spec(checkpoint))
        (checkpoint / "config.json").unlink()
        with pytest.raises(ModelError, match=r"no config\.json"):
            load(path_spec(checkpoint))

    def test_own_code(self, checkpoint: Path) -> None:
        edit(checkpoint, auto_map={"AutoModelForCausalLM": "evil.Evil"})
        (checkpoint / "evil.py").write_text("raise SystemExit('was run')")
        with pytest.raises(ModelError, match="brings its own code"):
            load(path_spec(checkpoint))
        refuse_unsafe(checkpoint, trust_remote_code=True)

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
    def test_link_out_of_the_folder(self, checkpoint: Path, tmp_path: Path, name: str) -> None:
        outside = tmp_path / "outside"
        (checkpoint / name).rename(outside)
        (checkpoint / name).symlink_to(outside)
        with pytest.raises(ModelError, match=rf"{name} points outside"):
            load(path_spec(checkpoint))

    def test_link_inside_is_fine(self, checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").rename(checkpoint / "weights.safetensors")
        (checkpoint / "model.safetensors").symlink_to("weights.safetensors")
        refuse_unsafe(checkpoint, trust_remote_code=False)

    def test_the_hubs_own_links_are_fine(self, checkpoint: Path, tmp_path: Path) -> None:
        blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
        snapshot.parent.mkdir(parents=True)
        blobs.mkdir()
        checkpoint.rename(snapshot)
        (snapshot / "model.safetensors").rename(blobs / "1")
        (snapshot / "model.safetensors").symlink_to(blobs / "1")
        refuse_unsafe(snapshot, trust_remote_code=False)

    @pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/weights.safetensors"])
    def test_index_that_points_outside(self, checkpoint: Path, name: str) -> None:
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match="is not inside"):
            load(path_spec(checkpoint))

    def test_index_that_names_a_pickle(self, checkpoint: Path) -> None:
        (checkpoint / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
        index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match="could run code"):
            load(path_spec(checkpoint))

    @pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json", "generation_config.json"])
    def test_own_code_of_something_else_than_the_model(self, checkpoint: Path, name: str) -> None:
        (checkpoint / name).write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
        (checkpoint / "evil.py").write_text("raise SystemExit('was run')")
        with pytest.raises(ModelError, match=rf"brings its own code \({name}\)"):
            load(path_spec(checkpoint))
        refuse_unsafe(checkpoint, trust_remote_code=True)

    def test_a_folder_that_links_out(self, checkpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "weights.safetensors").write_bytes(b"")
        (checkpoint / "more").symlink_to("../elsewhere", target_is_directory=True)
        with pytest.raises(ModelError, match="more points outside"):
            load(path_spec(checkpoint))

    def test_neither_language_nor_vision(self, checkpoint: Path) -> None:
        from transformers import AutoConfig

        from tasks.models.load import auto_class

        with pytest.raises(ModelError, match="'t5' is neither"):
            auto_class(AutoConfig.for_model("t5"))


OWN_CONFIG = """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own-llama"
"""
OWN_MODEL = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(checkpoint: Path) -> Path:
    """A checkpoint whose type only the code beside it knows."""
    (checkpoint / "configuration_own.py").write_text(OWN_CONFIG)
    (checkpoint / "modeling_own.py").write_text(OWN_MODEL)
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit(checkpoint, model_type="own-llama", architectures=["OwnForCausalLM"], auto_map=classes)
    return checkpoint


class TestTrustedCode:
    @pytest.fixture(autouse=True)
    def _forgotten(self) -> Iterator[None]:
        """Loading registers the classes for the whole process."""
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        registered = (AutoModelForCausalLM._model_mapping._extra_content, CONFIG_MAPPING._extra_content)
        before = [dict(content) for content in registered]
        yield
        for content, was in zip(registered, before, strict=True):
            content.clear()
            content.update(was)

    def test_refused_without_trust(self, own: Path, supervisor: Supervisor, bench: Any) -> None:
        row = supervisor.measure(bench.job(bench.cell(model=path_spec(own)))).row
        assert row["outcome"] == "error"
        assert "brings its own code (config.json); set trust_remote_code: true" in row["reason"]

    def test_a_cell_of_it(self, own: Path, supervisor: Supervisor, bench: Any) -> None:
        """Also its arithmetic is counted, on another instance of its class."""
        model = path_spec(own, trust_remote_code=True)
        row = supervisor.measure(bench.job(bench.cell(model=model, stack="fp32"))).row
        assert row["outcome"] == "ok", row["reason"]
        assert row["flops"] > 0

    @pytest.mark.parametrize("stack", ["fp32+fused-projections", "fp32+offload:to=disk", "fp32+prune"])
    def test_techniques_build_its_class(self, own: Path, bench: Any, stack: str) -> None:
        model = path_spec(own, trust_remote_code=True)
        with bench.live(bench.job(bench.cell(model=model, stack=stack))) as session:
            assert type(session.model).__name__ == "OwnForCausalLM"
            assert session.step.problems() == []
            for technique, chosen in session.techniques:
                assert technique.evidence(chosen, session).ok, chosen


class TestRandomWeights:
    @pytest.mark.parametrize("kind", ["language", "vision"])
    def test_equal_between_builds(self, bench: Any, kind: str) -> None:
        spec = getattr(bench, kind)
        one, other = load(spec).model.state_dict(), load(spec).model.state_dict()
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in one)

    def test_seed_changes_them(self, bench: Any) -> None:
        import torch

        from tasks.models.load import build_random, hf_config

        config = hf_config(random_config(bench.language.reference))
        one, two = (build_random(config, torch.float32, torch.device("cpu"), None, seed=seed) for seed in (0, 1))
        for name, weight in one.named_parameters():
            assert name.endswith("norm.weight") or not weight.equal(two.get_parameter(name)), name

    @pytest.mark.parametrize("kind", ["language", "vision"])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_dtype_only_rounds_them(self, bench: Any, kind: str, dtype: str) -> None:
        """Stacks of one comparison must run the same network."""
        spec = getattr(bench, kind)
        exact, rounded = load(spec, dtype="float32").model, load(spec, dtype=dtype).model
        for name, weight in exact.named_parameters():
            distance = (rounded.get_parameter(name).float() - weight).norm()
            assert distance <= 0.01 * weight.norm(), name

    @pytest.mark.parametrize(("stack", "error"), [("fp32+nf4", 0.12), ("fp32+int8", 0.02)])
    def test_compression_only_rounds_them(self, bench: Any, stack: str, error: float) -> None:
        import bitsandbytes as bnb

        exact = load(bench.language, dtype="float32").model
        with bench.live(bench.job(bench.cell("decode", stack)), calls=0) as session:
            for name, module in session.model.named_modules():
                if type(module).__name__ == "Linear4bit":
                    weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                elif type(module).__name__ == "Linear8bitLt":
                    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
                    weight = module.weight.data.float() * scales.view(-1, 1) / 127
                else:
                    continue
                truth = exact.get_submodule(name).weight.detach()
                assert float((weight.float() - truth).norm() / truth.norm()) < error, name

    def test_spread_is_the_configurations(self, bench: Any) -> None:
        model = load(bench.language).model
        assert float(model.model.layers[0].mlp.up_proj.weight.detach().std()) == pytest.approx(0.2, rel=0.05)

    def test_tied_head_stays_tied(self, bench: Any) -> None:
        spec = bench.random_model(
            "tied", {**random_config(bench.language.reference), "tie_word_embeddings": True}, "language"
        )
        model = load(spec).model
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not model.lm_head.weight.is_meta

    def test_linear_factory_never_holds_the_whole_model(self, bench: Any) -> None:
        """While one layer is replaced no other linear layer of the blocks has memory."""
        import torch

        from tasks.models.load import build_random, hf_config

        held: list[int] = []

        def tiny(name: str, linear: torch.nn.Linear) -> torch.nn.Module:
            alive = [item for item in gc.get_objects() if type(item) is torch.nn.Linear and not item.weight.is_meta]
            held.append(len([item for item in alive if item is not linear and item not in before]))
            return torch.nn.Identity()

        config = hf_config(random_config(bench.language.reference))
        gc.collect()
        before = {item for item in gc.get_objects() if type(item) is torch.nn.Linear}
        model = build_random(config, torch.float32, torch.device("cpu"), None, tiny)
        assert len(held) == 2 * 7 + 1
        assert max(held) <= 1, "the last one may not be collected yet"
        assert not [module for module in model.modules() if isinstance(module, torch.nn.Linear)]

    def test_built_in_its_dtype_on_the_device(self, bench: Any) -> None:
        import torch

        model = load(bench.language, dtype="bfloat16").model
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert not model.training

    def test_unknown_name_and_bad_file(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="neither a named architecture"):
            random_config("llama-9")
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ModelError, match="needs the key model_type"):
            random_config(str(tmp_path / "config.json"))


class TestFactories:
    @pytest.mark.parametrize(
        ("code", "said"),
        [
            ("x = 1", "cannot be found"),
            ("import nowhere_to_be_found", "cannot be found"),
            ("def make(): return 5", "must return"),
            ("def make(): return (1,)", "must return"),
        ],
    )
    def test_errors_say_what_to_return(self, bench: Any, code: str, said: str) -> None:
        import torch

        from tasks.models.load import load as load_model

        model, path = bench.factory(code)
        with pytest.raises(ModelError, match=said):
            load_model(model, LoadOptions(), torch.device("cpu"), path)

    def test_dtype_is_applied(self, bench: Any) -> None:
        import torch

        from tasks.models.load import load as load_model

        model, path = bench.factory("import torch\ndef make(): return torch.nn.Linear(2, 2), lambda *_: None")
        loaded = load_model(model, LoadOptions(dtype="bfloat16"), torch.device("cpu"), path)
        assert loaded.model.weight.dtype == torch.bfloat16


class TestIdentity:
    def test_hash_is_of_the_contents(self, checkpoint: Path) -> None:
        before = checkpoint_hash(path_spec(checkpoint))
        assert before == checkpoint_hash(ModelSpec(id="pocket", source="pocket"))
        (checkpoint / "README.md").write_text("no part of the weights")
        assert checkpoint_hash(path_spec(checkpoint)) == before
        edit(checkpoint, rms_norm_eps=1e-5)
        assert checkpoint_hash(path_spec(checkpoint)) != before

    def test_configuration_without_torch(self, bench: Any) -> None:
        config = config_of(bench.POCKET)
        assert config is not None
        assert config["model_type"] == "llama"
        assert config_of(ModelSpec(id="h", source="hub", reference="a/b")) is None
