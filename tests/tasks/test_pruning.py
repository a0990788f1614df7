"""Pruning: the least important goes, what is left is really smaller, saved, loaded again, and computes the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts import find, make_wanted, wanted
from tasks.optimization import Unsupported
from tasks.optimizations._pruning import Sizes, keep_layers, prune, pruned_config, pruned_sizes, sizes_of
from tasks.optimizations.sparse_2_4 import block_linears, two_of_four
from tasks.registry import optimizations
from tasks.row import Row
from tasks.session import Session
from tasks.stacks import unsupported

pytestmark = pytest.mark.slow

BEFORE = Sizes(mlp=128, heads=2, layers=3)


@pytest.fixture
def model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def ids() -> Any:
    import torch

    return torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))


def logits(model: Any, ids: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


class TestSizes:
    def test_a_share_is_removed(self) -> None:
        assert pruned_sizes(BEFORE, "mlp", 0.25) == Sizes(mlp=96, heads=2, layers=3)
        assert pruned_sizes(BEFORE, "layers", 0.4) == Sizes(mlp=128, heads=2, layers=2)
        wide = Sizes(mlp=14336, heads=8, layers=32)
        assert pruned_sizes(wide, "mlp", 0.3).mlp == 9984, "10035 channels as a multiple of 256"
        assert pruned_sizes(wide, "mlp", 0.005).mlp == 14336 - 256, "the least that can go"
        assert pruned_sizes(wide, "mlp", 0.3).mlp % 64 == 0

    @pytest.mark.parametrize(("what", "ratio"), [("heads", 0.2), ("layers", 0.1), ("layers", 0.9), ("mlp", 0.001)])
    def test_nothing_and_all_are_refused(self, what: str, ratio: float) -> None:
        with pytest.raises(Unsupported, match="removes"):
            pruned_sizes(BEFORE, what, ratio)

    def test_a_configuration_that_its_class_refuses(self) -> None:
        """transformers wants the hidden size to be a multiple of the heads, even where head_dim is given."""
        from transformers import LlamaConfig

        config = LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
        with pytest.raises(Unsupported, match=r"cannot have 24 attention heads.*it can keep 1, 2, 4 of 8"):
            pruned_config(config, dataclasses.replace(sizes_of(config), heads=6))


class TestPrune:
    @pytest.mark.parametrize("importance", ["magnitude", "activation"])
    @pytest.mark.parametrize("what", ["mlp", "heads", "layers"])
    def test_what_does_nothing_goes_first(self, model: Any, ids: Any, what: str, importance: str) -> None:
        """A structure that adds nothing is made; without it the outputs are what they were."""
        import torch

        with torch.no_grad():
            for block in model.model.layers:
                if what == "mlp":
                    for linear in (block.mlp.gate_proj, block.mlp.up_proj):
                        linear.weight[5:37] = 0
                    block.mlp.down_proj.weight[:, 5:37] = 0
                if what == "heads":
                    for linear, size in ((block.self_attn.q_proj, 32), (block.self_attn.k_proj, 16)):
                        linear.weight[:size] = 0
                    block.self_attn.v_proj.weight[:16] = 0
                    block.self_attn.o_proj.weight[:, :32] = 0
            if what == "layers":
                for parameter in model.model.layers[1].parameters():
                    parameter.zero_()
        before, expected = model.num_parameters(), logits(model, ids)
        after = {
            "mlp": Sizes(mlp=96, heads=2, layers=3),
            "heads": Sizes(mlp=128, heads=1, layers=3),
            "layers": Sizes(mlp=128, heads=2, layers=2),
        }[what]
        facts = prune(model, what, after, importance, ids)
        assert torch.allclose(logits(model, ids), expected, atol=1e-5)
        assert facts["importance_kept"] == pytest.approx(1)
        assert sizes_of(model.config) == after
        assert model.num_parameters() < before
        if what == "layers":
            assert facts["layers_kept"] == [0, 2]

    @pytest.mark.parametrize("what", ["mlp", "heads", "layers"])
    def test_saved_and_loaded_it_is_the_same(self, model: Any, ids: Any, tmp_path: Path, what: str) -> None:
        from transformers import AutoModelForCausalLM

        prune(model, what, pruned_sizes(BEFORE, what, 0.4), "activation", ids)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert logits(again, ids).equal(logits(model, ids))
        assert again.num_parameters() == model.num_parameters()
        assert again.generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 35)

    def test_measures_differ_where_inputs_do(self, model: Any, ids: Any) -> None:
        """A channel with large weights that never fires matters by magnitude only."""
        import torch

        mlp = model.model.layers[0].mlp
        with torch.no_grad():
            mlp.up_proj.weight[7] = 0
            mlp.gate_proj.weight[7] *= 50
            marked = mlp.down_proj.weight[:, 7].clone()
        by = {}
        for importance in ("magnitude", "activation"):
            import copy

            other = copy.deepcopy(model)
            prune(other, "mlp", Sizes(mlp=120, heads=2, layers=3), importance, ids)
            columns = other.model.layers[0].mlp.down_proj.weight.T
            by[importance] = any(column.equal(marked) for column in columns)
        assert by == {"magnitude": True, "activation": False}

    def test_other_blocks_are_refused(self, ids: Any) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        from tasks.optimizations._pruning import blocks_of

        with pytest.raises(Unsupported, match="GPT2LMHeadModel"):
            blocks_of(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32)))

    def test_layers_keep_their_own_types(self, model: Any) -> None:
        model.config.layer_types = ["a", "b", "c"]
        keep_layers(model, [0, 2])
        assert (model.config.layer_types, model.config.num_hidden_layers) == (["a", "c"], 2)
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]


class TestRow:
    @pytest.fixture(scope="class")
    @classmethod
    def session(cls, bench: Any) -> Iterator[Session]:
        with bench.live(bench.job(bench.cell("prefill", "prune", bench.POCKET)), calls=1) as session:
            yield session

    def test_another_ratio_is_caught(self, bench: Any, session: Session) -> None:
        (technique,) = bench.cell("prefill", "prune:ratio=0.5", bench.POCKET).stack.techniques
        assert not optimizations()["prune"].evidence(technique, session).ok

    @pytest.mark.parametrize("options", ["recover_steps=500", "importance=magnitude"])
    def test_what_another_artifact_has_is_caught(self, bench: Any, session: Session, options: str) -> None:
        """A recovery that was never done, an importance that was not asked: the sizes are the same."""
        (technique,) = bench.cell("prefill", f"prune:{options}", bench.POCKET).stack.techniques
        assert not optimizations()["prune"].evidence(technique, session).ok

    @pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
    def test_other_weights_are_caught(self, bench: Any, session: Session, name: str) -> None:
        (technique,) = bench.cell("prefill", "prune", bench.POCKET).stack.techniques
        assert optimizations()["prune"].evidence(technique, session).ok
        weight = session.model.get_parameter(name).data
        kept = weight.clone()
        weight.normal_()
        evidence = optimizations()["prune"].evidence(technique, session)
        weight.copy_(kept)
        assert evidence.facts["weights_of_the_artifact"] is False
        assert not evidence.ok

    def test_parameters_in_the_row(self, session: Session) -> None:
        from tasks.metrics.parameters import Parameters, Phase

        metric = Parameters()
        metric.end(Phase.WARMUP, session)
        # 192 of 768 channels of three matrices 256 wide, in five layers
        assert metric.collect(session)["parameters_total"] == 4_459_264 - 5 * 3 * 256 * 192
        assert session.loaded is not None
        assert (session.loaded.weights, len(session.loaded.tokenizer)) == ("trained", 2048)


class TestTechnique:
    def test_masked_channels_are_no_pruning(self, bench: Any) -> None:
        """The pretender that torch.nn.utils.prune is: zeros in the full shapes."""
        cell = bench.cell("prefill", "prune", bench.POCKET)
        with bench.live(bench.job(cell), applied="baseline") as session:
            for block in session.model.model.layers:
                block.mlp.up_proj.weight.data[:192] = 0
            (technique,) = cell.stack.techniques
            evidence = optimizations()["prune"].evidence(technique, session)
        assert not evidence.ok
        assert evidence.facts["found"]["mlp"] == [768]

    def test_compressed_after_pruning(self, bench: Any) -> None:
        """NF4 loads the pruned checkpoint, and both prove themselves; random weights too."""
        # NF4 has one scale for 64 weights of a row
        for stack, model in (("prune+nf4", bench.POCKET), ("prune:ratio=0.5+nf4", bench.language)):
            with bench.live(bench.job(bench.cell("prefill", stack, model))) as session:
                for technique, chosen in session.techniques:
                    evidence = technique.evidence(chosen, session)
                    assert evidence.ok, evidence.facts
                assert session.loaded.weights == ("trained" if model.source == "pocket" else "random")

    def test_offloaded_layers_hold_nothing_to_compare(self, bench: Any) -> None:
        cell = bench.cell("decode", "fp32+prune+offload:keep=0,to=disk", bench.POCKET, prompt_tokens=8, new_tokens=2)
        with bench.live(bench.job(cell), calls=1) as session:
            technique, chosen = session.techniques[1]
            evidence = technique.evidence(chosen, session)
        assert technique.name == "prune"
        assert evidence.ok, evidence.facts

    def test_recovery_lowers_the_loss(self, bench: Any) -> None:
        job = bench.job(bench.cell("prefill", "prune:what=layers,ratio=0.5,recover_steps=14", bench.POCKET))
        import torch

        torch.manual_seed(0)
        made, _ = make_wanted(Session(job=job, device=torch.device("cpu"), row=Row()), "prune")
        recovery = made.manifest.facts["recovery"]
        assert recovery["steps"] == 14
        assert recovery["loss_last"] < recovery["loss_first"] - 0.2
        from safetensors import safe_open

        with safe_open(made.folder / "model.safetensors", framework="pt") as file:
            assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16, "as published"

    def test_refused_when_planned(self, bench: Any) -> None:
        for stack, said in (
            ("prune:ratio=1.5", "between 0 and 1"),
            ("prune:what=heads,ratio=0.1", "removes 0 of 2"),
            ("distill:layers=1", "a student needs fewer layers"),
            ("distill:student=llama-9", "neither a named architecture"),
            ("distill:steps=0", "a budget"),
            ("distill:steps=1", "at least 2 steps"),
        ):
            assert said in str(unsupported(bench.cell("prefill", stack, bench.POCKET), bench.device()))

    def test_formats_with_groups_are_asked_about_the_width_that_is_left(self, bench: Any) -> None:
        """Of 768 channels 576 are left, which is no multiple of 128; of 2816, 2048 are."""
        device = dataclasses.replace(
            bench.device(), packages={**bench.device().packages, "gptqmodel": "7.6.0", "torchao": "0.18.0"}
        )
        for stack in ("bf16+prune+gptq", "bf16+prune+ao-int4"):
            refusal = str(unsupported(bench.cell("decode", stack, bench.POCKET), device))
            assert "groups 128 inputs, pocket has 576" in refusal, refusal
            assert unsupported(bench.cell("decode", stack.replace("+prune", ""), bench.POCKET), device) is None
        assert pruned_sizes(Sizes(mlp=2816, heads=4, layers=12), "mlp", 0.25).mlp == 2048

    def test_options_files_and_seed_make_other_artifacts(self, bench: Any, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("def f():\n    return 1\n" * 1000)
        jobs = [
            bench.job(bench.cell("prefill", stack, bench.POCKET), search_path=(str(tmp_path),))
            for stack in ("prune", "prune:text=mine.txt", "prune:ratio=0.3", "sparse-2-4", "distill")
        ]
        keys = {wanted(job)[0].spec.key for job in jobs}
        assert len(keys) == 5
        assert find(wanted(jobs[2])[0].spec, Path(jobs[2].artifact_dir)) is None


class TestTwoOfFour:
    def test_keeps_the_greatest_two_of_every_four(self) -> None:
        import torch

        mask = two_of_four(torch.tensor([[4.0, 1, 3, 2, 0, 0, 9, 9], [1, 2, 3, 4, 8, 7, 6, 5]]))
        assert mask.int().tolist() == [[1, 0, 1, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0]]
        with pytest.raises(Unsupported, match="6 inputs"):
            two_of_four(torch.ones(2, 6))

    @pytest.mark.parametrize("importance", ["activation", "magnitude"])
    def test_checkpoint_has_its_zeros(self, bench: Any, importance: str) -> None:
        """The artifact can be made on any device; only its compression needs a card."""
        import torch
        from transformers import AutoModelForCausalLM

        job = bench.job(bench.cell("prefill", f"sparse-2-4:importance={importance}", bench.POCKET))
        made, _ = make_wanted(Session(job=job, device=torch.device("cpu"), row=Row()), "sparse-2-4")
        model = AutoModelForCausalLM.from_pretrained(made.folder)
        layers = block_linears(model)
        assert len(layers) == made.manifest.facts["layers"] == 35
        for layer in layers.values():
            zeros = (layer.weight.view(-1, 4) == 0).sum(1)
            assert int(zeros.min()) >= 2
        assert (model.lm_head.weight == 0).float().mean() < 0.01

    def test_needs_half_precision(self, bench: Any) -> None:
        card = bench.device("cuda")
        assert "fp16 or bf16" in str(unsupported(bench.cell("prefill", "fp32+sparse-2-4", bench.POCKET), card))
        assert unsupported(bench.cell("prefill", "sparse-2-4", bench.POCKET), card) is None
        assert "float32" in str(unsupported(bench.cell("prefill", "sparse-2-4"), card))

    def test_zeros_in_dense_layers_are_no_sparsity(self, bench: Any) -> None:
        cell = bench.cell("prefill", "sparse-2-4", bench.POCKET)
        with bench.live(bench.job(cell), applied="baseline") as session:
            for layer in block_linears(session.model).values():
                layer.weight.data *= two_of_four(layer.weight.abs())
            (technique,) = cell.stack.techniques
            assert not optimizations()["sparse-2-4"].evidence(technique, session).ok
