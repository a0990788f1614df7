"""GGUF in llama.cpp: types by arithmetic and as stored, the same model as in torch, and evidence that cannot lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from tasks.cell import ModelSpec
from tasks.models.gguf_file import StoredTensor
from tasks.models.identity import random_config
from tasks.optimization import Evidence
from tasks.optimizations._gguf_types import BLOCKS, MIXTURES, bits_of, expected_types, is_matrix, stored_bytes
from tasks.registry import optimizations
from tasks.row import Row
from tasks.session import Session
from tasks.stacks import parse_stack, unsupported

backends = pytest.mark.backends


def layout(
    layers: int, hidden: int, mlp: int, keys: int, vocabulary: int, *, tied: bool = False, type_name: str = "F16"
) -> list[StoredTensor]:
    """The tensors of a Llama file, all of one type."""
    shapes = {"token_embd.weight": (vocabulary, hidden), "output_norm.weight": (1, hidden)}
    if not tied:
        shapes["output.weight"] = (vocabulary, hidden)
    for block in (f"blk.{number}." for number in range(layers)):
        shapes |= {f"{block}attn_norm.weight": (1, hidden), f"{block}ffn_norm.weight": (1, hidden)}
        shapes |= {f"{block}{name}.weight": (hidden, hidden) for name in ("attn_q", "attn_output")}
        shapes |= {f"{block}{name}.weight": (keys, hidden) for name in ("attn_k", "attn_v")}
        shapes |= {f"{block}{name}.weight": (mlp, hidden) for name in ("ffn_gate", "ffn_up")}
        shapes[f"{block}ffn_down.weight"] = (hidden, mlp)
    return [
        StoredTensor(name=name, type=type_name, rows=rows, columns=columns, bytes=0)
        for name, (rows, columns) in shapes.items()
    ]


class TestArithmetic:
    @pytest.mark.parametrize(
        ("type_name", "bits"),
        [("F16", 16), ("Q8_0", 8.5), ("Q6_K", 6.5625), ("Q5_K", 5.5), ("Q4_K", 4.5), ("Q4_0", 4.5), ("Q3_K", 3.4375),
         ("Q2_K", 2.625)],
    )  # fmt: skip
    def test_bits_of_a_block(self, type_name: str, bits: float) -> None:
        assert bits_of(type_name) == bits

    @pytest.mark.parametrize(
        ("mixture", "gigabytes"),
        [("Q8_0", 8.54), ("Q6_K", 6.60), ("Q5_K_M", 5.73), ("Q5_K_S", 5.60), ("Q4_K_M", 4.92), ("Q4_K_S", 4.69),
         ("Q4_0", 4.66), ("Q3_K_M", 4.02), ("Q3_K_S", 3.66), ("Q2_K", 3.18), ("F16", 16.07)],
    )  # fmt: skip
    def test_llama_8b_has_the_size_of_the_published_files(self, mixture: str, gigabytes: float) -> None:
        """Sizes of the files of Llama 3.1 8B that are offered for download: 7.8 MB are tokenizer."""
        tensors = layout(32, 4096, 14336, 1024, 128256)
        types = expected_types(MIXTURES[mixture], tensors, group=4)
        total = sum(stored_bytes(types[t.name][1], t) if is_matrix(t) else 4 * t.elements for t in tensors)
        assert (total + 7.8e6) / 1e9 == pytest.approx(gigabytes, rel=0.004)

    def test_rows_that_blocks_do_not_divide_get_another_type(self) -> None:
        types = expected_types(MIXTURES["Q4_K_M"], layout(8, 256, 704, 128, 512, tied=True))
        assert types["blk.0.ffn_up.weight"] == ("Q4_K", "Q4_K"), "its rows are 256 long"
        assert types["blk.0.ffn_down.weight"] == ("Q6_K", "Q8_0")
        assert types["blk.1.ffn_down.weight"] == ("Q4_K", "Q5_0")
        assert types["token_embd.weight"] == ("Q6_K", "Q6_K"), "tied: it is the head"
        odd = expected_types(MIXTURES["Q4_K_M"], layout(2, 72, 144, 36, 512, tied=True))
        assert {found for _, found in odd.values()} == {"F16"}

    @backends
    def test_blocks_are_the_librarys(self) -> None:
        import gguf

        sizes = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
        assert {name: sizes[name] for name in BLOCKS} == BLOCKS

    @backends
    def test_codes_are_the_librarys(self) -> None:
        import gguf

        for name, mixture in MIXTURES.items():
            known = gguf.LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"]
            assert known.value == mixture.code


class TestRefusals:
    @pytest.fixture
    def refusal(self, bench: Any) -> Callable[..., str]:
        packages = {**bench.device().packages, "gguf": "0.19.0", "llama-cpp-python": "0.3.36"}

        def of(stack: str = "gguf", model: ModelSpec | None = None, kind: str = "prefill", **device: Any) -> str:
            reason = unsupported(bench.cell(kind, stack, model), bench.device(packages=packages, **device))
            assert reason is None or len(reason) < 200
            return reason or ""

        return of

    def changed(self, bench: Any, name: str, **changes: Any) -> ModelSpec:
        config = {**random_config(bench.language.reference), **changes}
        model: ModelSpec = bench.random_model(name, config, "language")
        return model

    @pytest.mark.parametrize("stack", ["gguf", "gguf:type=Q8_0", "fp32+gguf", "prune+gguf", "distill+gguf"])
    def test_what_works(self, refusal: Callable[..., str], bench: Any, stack: str) -> None:
        assert refusal(stack, bench.POCKET) == ""
        assert refusal("gguf+sync-check", kind="decode") == ""

    @pytest.mark.parametrize("other", ["bf16", "fp16", "eager", "compile"])
    def test_what_changes_a_torch_model(self, refusal: Callable[..., str], other: str) -> None:
        assert f"gguf runs the model in llama.cpp: no {other}" in refusal(f"{other}+gguf")

    def test_caches_of_torch(self, refusal: Callable[..., str]) -> None:
        assert "no static-cache" in refusal("gguf+static-cache", kind="decode")

    def test_models(self, refusal: Callable[..., str], bench: Any) -> None:
        assert "llama, mistral, qwen2, gpt2" in refusal(model=self.changed(bench, "neox", model_type="gpt_neox"))
        assert "sliding" in refusal(
            model=self.changed(bench, "mistral", model_type="mistral", sliding_window=64, max_position_embeddings=512)
        )
        yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
        assert "yarn" in refusal(model=self.changed(bench, "yarn", rope_parameters=yarn))
        assert "gelu" in refusal(model=self.changed(bench, "gelu", hidden_act="gelu"))

    def test_the_command_that_builds_it(self, bench: Any) -> None:
        reason = unsupported(bench.cell("prefill", "gguf"), bench.device(packages={}))
        assert reason is not None
        assert "CMAKE_ARGS='-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF' pip install '.[gguf]'" in reason


ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied-biased": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama-wide-heads": {"head_dim": 32, "intermediate_size": 96},
    "llama-rope3": {"rope_parameters": ROPE},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0}},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": 256,
             "initializer_range": 0.2, "dtype": "float32", "bos_token_id": 0, "eos_token_id": 0},
}  # fmt: skip


def proof(session: Session, stack: str = "gguf") -> Evidence:
    chosen = next(technique for technique in parse_stack(stack).techniques if technique.name == "gguf")
    return optimizations()["gguf"].evidence(chosen, session)


@pytest.fixture(scope="module")
def brought(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelSpec]:
    """Tiny checkpoints on the disk whose weights are all random, biases and norms too: a bias of 0 proves nothing."""

    def of(name: str, **changes: Any) -> ModelSpec:
        import torch

        from tasks.models.load import build_random, hf_config

        config = ARCHITECTURES[name]
        config = {**({} if name == "gpt2" else random_config(bench.language.reference)), **config, **changes}
        folder = tmp_path_factory.mktemp(name)
        model = build_random(hf_config(config), torch.float32, torch.device("cpu"), None)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        return ModelSpec(id=name, source="path", reference=str(folder), kind="language")

    return of


@backends
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_logits_and_tokens_as_torch(bench: Any, brought: Callable[[str], ModelSpec], name: str) -> None:
    """F32 in a file, F32 in the cache: prompts in a batch, then token after token."""
    model, stack, reference = brought(name), "gguf:type=F32", parse_stack("fp32+eager")
    prefill = bench.cell("prefill", stack, model, batch_size=3, sequence_length=200)
    decode = bench.cell("decode", stack, model, batch_size=2, prompt_tokens=20, new_tokens=12)
    with bench.live(bench.job(replace(prefill, stack=reference))) as session:
        theirs = session.model(input_ids=session.step._inputs[0], use_cache=False).logits
        total = sum(parameter.numel() for parameter in session.model.parameters())
    with bench.live(bench.job(replace(decode, stack=reference))) as session:
        expected = session.step.tokens.clone()
    with bench.live(bench.job(prefill)) as session:
        assert session.step.problems() == []
        ours = session.model(input_ids=session.step._inputs[0], use_cache=False).logits
        # gelu is a table of fp16 numbers in llama.cpp
        assert float((ours - theirs).norm() / theirs.norm()) < (2e-3 if name == "gpt2" else 1e-5)
        assert session.step.logits[:, -1].allclose(ours[:, -1], rtol=1e-3, atol=1e-4)
        assert session.model.weights.parameters == total
        evidence = proof(session, stack)
        assert evidence.ok, evidence.facts
    with bench.live(bench.job(decode)) as session:
        assert session.step.tokens.equal(expected)


@backends
class TestOnPocket:
    @pytest.fixture(scope="class")
    @classmethod
    def judged(cls, bench: Any) -> Callable[[str], tuple[Any, Evidence, int]]:
        """Reading, evidence and bytes of pocket in a type; the readings are of the same tokens and questions."""
        from tasks.quality import judge, make_reference

        known: dict[str, tuple[Any, Evidence, int]] = {}

        def of(type_name: str) -> tuple[Any, Evidence, int]:
            if type_name not in known:
                stack = f"gguf:type={type_name}"
                job = bench.job(bench.cell("prefill", stack, bench.POCKET), quality=True, quality_choices=20)
                with bench.live(job) as session:
                    make_reference(Session(job=job, device=session.device, row=Row()))
                    known[type_name] = judge(session), proof(session, stack), session.model.weights.bytes
            return known[type_name]

        return of

    @pytest.mark.parametrize(
        ("type_name", "largest"), [("F32", 1e-5), ("F16", 1e-3), ("Q8_0", 1e-2), ("Q4_K_M", 5e-2), ("Q3_K_M", 0.1)]
    )
    def test_perplexity_of_the_reference(self, judged: Callable[[str], Any], type_name: str, largest: float) -> None:
        reading, evidence, _ = judged(type_name)
        assert evidence.ok, evidence.facts
        assert reading.label == "quality"
        assert abs(reading.perplexity_log_ratio) < largest
        assert reading.choices == 20

    def test_fewer_bits_are_farther_from_the_reference(self, judged: Callable[[str], Any]) -> None:
        readings = [judged(name)[0] for name in ("F16", "Q8_0", "Q4_K_M", "Q3_K_M")]
        apart = [reading.kl_divergence for reading in readings]
        assert all(2 * less < more for less, more in pairwise(apart)), apart
        agree = [reading.top1_agreement for reading in readings]
        assert agree == sorted(agree, reverse=True)
        assert readings[2].perplexity < readings[3].perplexity

    @pytest.mark.parametrize(
        ("type_name", "bits"), [("F16", 16.0), ("Q8_0", 8.5), ("Q4_K_M", 4.5 + 2.0625 * 0.22), ("Q3_K_M", 4.18)]
    )
    def test_bytes_by_hand(self, judged: Callable[[str], Any], type_name: str, bits: float) -> None:
        """Every row of pocket is whole blocks of 256; norms are fp32. In Q4_K_M 22 % of the weights have 6 bits."""
        _, evidence, held = judged(type_name)
        weights, norms = 2048 * 256 + 5 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 768), 11 * 256
        assert held == pytest.approx(weights * bits / 8 + 4 * norms, rel=0.01)
        assert evidence.facts["fallback"] == {}
        assert evidence.facts["bits_per_weight"] == pytest.approx(evidence.facts["bits_per_weight_by_arithmetic"])

    @pytest.mark.parametrize("type_name", ["F32", "F16"])
    def test_greedy_tokens_of_torch(self, bench: Any, type_name: str) -> None:
        axes = {"batch_size": 2, "prompt_tokens": 64, "new_tokens": 32}
        with bench.live(bench.job(bench.cell("decode", "fp32+eager", bench.POCKET, **axes))) as session:
            expected = session.step.tokens.clone()
        with bench.live(bench.job(bench.cell("decode", f"gguf:type={type_name}", bench.POCKET, **axes))) as session:
            assert session.step.problems() == []
            assert session.step.tokens.equal(expected)
            # 2 sequences of 256 positions, 5 layers of 2 heads of 64 numbers for keys and values
            assert session.step.cache_bytes() == 2 * 256 * 5 * 2 * 2 * 64 * (4 if type_name == "F32" else 2)

    @pytest.mark.parametrize("before", ["prune:what=layers,ratio=0.2", "prune:what=heads,ratio=0.5", "distill"])
    def test_what_was_made_before_it(self, bench: Any, before: str) -> None:
        stack = f"{before if before != 'distill' else 'distill:layers=0.4,steps=12'}+gguf:type=Q8_0"
        with bench.live(bench.job(bench.cell("prefill", stack, bench.POCKET))) as session:
            for technique, chosen in session.techniques:
                evidence = technique.evidence(chosen, session)
                assert evidence.ok, (str(chosen), evidence.facts)
            assert session.model.sizes()["num_hidden_layers"] == session.loaded.config.num_hidden_layers

    def test_a_stop_check_beside_it(self, bench: Any) -> None:
        cell = bench.cell("decode", "gguf+sync-check", bench.POCKET, prompt_tokens=16, new_tokens=8, stop="eos")
        with bench.live(bench.job(cell)) as session:
            assert session.step.problems() == []
            for technique, chosen in session.techniques:
                assert technique.evidence(chosen, session).ok


@backends
def test_what_falls_back_is_counted(bench: Any) -> None:
    """96 MLP channels are no whole blocks of 256, 64 hidden ones neither: blocks of 32 hold both."""
    model = bench.random_model(
        "gguf-narrow", {**random_config(bench.language.reference), "intermediate_size": 96}, "language"
    )
    with bench.live(bench.job(bench.cell("prefill", "gguf", model))) as session:
        evidence = proof(session)
    assert evidence.ok, evidence.facts
    assert set(evidence.facts["tensors"]) == {"F32", "Q5_0", "Q8_0"}
    assert evidence.facts["fallback"] == {key: n for key, n in evidence.facts["tensors"].items() if key != "F32"}


@backends
class TestPretenders:
    def prove(self, bench: Any, folder: Any, tamper: Callable[[Any], None] | None = None, **live: Any) -> Evidence:
        job = bench.job(bench.cell("prefill", "gguf", bench.POCKET), artifact_dir=str(folder))
        with bench.live(job, **live) as session:
            if tamper is not None:
                tamper(session)
            return proof(session)

    @pytest.mark.parametrize("code", [1, 14], ids=["F16", "Q4_K_S"])
    def test_another_type_under_its_label(
        self, bench: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        import gguf

        from tasks.models import llama_cpp

        really = llama_cpp.quantize

        def pretend(source: Any, target: Any, wanted: int, threads: int) -> None:
            really(source, target, code, threads)
            reader = gguf.GGUFReader(target, "r+")
            reader.fields["general.file_type"].parts[-1][0] = wanted
            reader.data.flush()

        monkeypatch.setattr(llama_cpp, "quantize", pretend)
        evidence = self.prove(bench, tmp_path)
        assert not evidence.ok
        assert evidence.facts["in_another_type"]

    def test_another_file(self, bench: Any, tmp_path: Any) -> None:
        """What is loaded must be what the artifact is, not a file of the same types."""

        def swap(session: Session) -> None:
            from tasks.models.gguf_file import write_gguf
            from tasks.models.llama_cpp import LlamaCpp, quantize

            other = bench.job(bench.cell("prefill", "baseline", bench.POCKET))
            with bench.live(other) as plain:
                write_gguf(plain.model, tmp_path / "exact.gguf", "another")
            quantize(tmp_path / "exact.gguf", tmp_path / "other.gguf", 15, 1)
            session.loaded = replace(
                session.loaded, model=LlamaCpp(tmp_path / "other.gguf", session.model.config, threads=1)
            )
            session.model(input_ids=session.step._inputs[0])

        evidence = self.prove(bench, tmp_path / "store", swap)
        assert not evidence.ok
        assert evidence.facts["same"] == {"key": False, "file": False, "bytes": True, "parameters": True}

    def test_other_threads(self, bench: Any, tmp_path: Any, torch_settings: None) -> None:
        import torch

        assert self.prove(bench, tmp_path).ok
        assert not self.prove(bench, tmp_path, lambda _session: torch.set_num_threads(2)).ok

    @pytest.mark.parametrize("applied", ["baseline", "gguf:type=Q8_0"])
    def test_another_stack(self, bench: Any, tmp_path: Any, applied: str) -> None:
        evidence = self.prove(bench, tmp_path, applied=applied)
        assert not evidence.ok
        assert evidence.facts
