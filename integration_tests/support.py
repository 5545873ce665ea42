"""What works where. README's table is made of this, and `tests/test_readme.py` holds every claim to the test that shows it.

A feature that works names the test that serves it with the engine itself; one that is refused, the test that reads the refusal. `gpu` names
the machine that the same was seen on by a test marked gpu, or by SGLang's gpu_check.py, and stays empty until then.
"""

from dataclasses import dataclass

VLLM, SGLANG = "integration_tests/engine_vllm/", "integration_tests/engine_sglang/"


@dataclass(frozen=True)
class Works:
    """test: "file::function", under integration_tests."""

    test: str
    gpu: str = ""

    def __str__(self) -> str:
        return f"[yes]({self.test.partition('::')[0]})" + (f", {self.gpu} too" if self.gpu else "")


@dataclass(frozen=True)
class Refused:
    test: str
    gpu = ""

    def __str__(self) -> str:
        return f"[refused]({self.test.partition('::')[0]})"


Cell = Works | Refused | None  # None: not tested with this engine

_ANSWERS = VLLM + "test_serving.py::test_computes_what_the_checkpoint_says"
_KV_REFUSED = VLLM + "test_kv_contract.py::test_refused_with_a_way_out"
_PAGES_REFUSED = SGLANG + "test_arguments.py::test_refuses_what_pages_cannot_do"
_MODELS_REFUSED = SGLANG + "test_arguments.py::test_refuses_models_without_such_pages"
_PAGES = SGLANG + "test_kv.py::test_layout"

# feature -> (vLLM, SGLang)
WEIGHTS: dict[str, tuple[Cell, Cell]] = {
    "a mixed checkpoint": (
        Works(_ANSWERS, "H100"),
        Works(SGLANG + "test_weights.py::test_mixed_checkpoint_answers_as_its_weights_say", "H100"),
    ),
    "q, k, v or gate, up in formats of their own; quantized embedding and head": (
        Works(_ANSWERS),
        Works(SGLANG + "test_weights.py::test_fused_layers_of_different_formats_and_a_quantized_vocabulary"),
    ),
    "tensor parallelism": (Works(_ANSWERS), Works(SGLANG + "test_weights.py::test_two_ranks_and_a_tied_vocabulary")),
    "quantizing while loading": (Works(_ANSWERS, "H100"), Works(SGLANG + "test_weights.py::test_quantized_while_loading")),
    "a compressed-tensors checkpoint of other tools": (
        Works(_ANSWERS),
        Works(SGLANG + "test_weights.py::test_sglang_alone_loads_differing_shards_wrong"),
    ),
    "AutoAWQ, GPTQ (act-order on one rank), NVIDIA ModelOpt": (
        Works(_ANSWERS),
        Works(SGLANG + "test_weights.py::test_modelopts_layout_and_its_own_file"),
    ),
    "a checkpoint packed for the GPU kernel": (Works(_ANSWERS), Works(SGLANG + "test_weights.py::test_packed_on_two_ranks")),
    "mixtures of experts: gate, up and down in formats of their own": (
        Works(_ANSWERS),
        Works(SGLANG + "test_weights.py::test_experts_of_different_formats_on_two_ranks"),
    ),
    "experts with biases or other activations, on the move (EPLB)": (
        Refused(VLLM + "test_moe_contract.py::test_what_is_not_computed_here_is_refused"),
        Refused(SGLANG + "test_weights.py::test_experts_that_are_not_computed_here_are_refused"),
    ),
    "LoRA adapters over quantized layers": (Works(VLLM + "test_lora.py::test_an_adapter_is_added_to_layers_of_every_format"), None),
    "a damaged checkpoint": (
        Refused(VLLM + "test_refusals.py::test_scales_that_are_nan"),
        Refused(SGLANG + "test_weights.py::test_refuses_scales_that_are_not_finite"),
    ),
}
KV: dict[str, tuple[Cell, Cell]] = {
    "prefix cache": (Works(VLLM + "test_kv.py::test_prompt_served_cold_and_from_the_prefix_cache", "H100"), Works(_PAGES, "H100")),
    "chunked prefill": (Works(VLLM + "test_kv.py::test_prompt_in_small_chunks"), Works(_PAGES)),
    "many requests at once": (Works(VLLM + "test_kv.py::test_eight_clients_at_once_get_what_one_gets", "H100"), Works(_PAGES, "H100")),
    "preemption": (Works(VLLM + "test_kv.py::test_preemption_changes_nothing_but_rounding"), None),
    "a layout per layer": (
        Works(VLLM + "test_kv.py::test_checkpoint_that_names_its_kv"),
        Works(SGLANG + "test_arguments.py::test_a_checkpoint_may_give_layers_layouts_of_their_own"),
    ),
    "several query tokens a step (speculation)": (
        Works(VLLM + "test_kv.py::test_speculation_changes_no_token"),
        Refused(_PAGES_REFUSED),
    ),
    "latent attention (MLA), encoders": (
        Refused(VLLM + "test_kv_contract.py::test_latent_attention_is_refused"),
        Refused(_MODELS_REFUSED),
    ),
    "layers left in 16 bits by the engine's own option": (Refused(_KV_REFUSED), None),
    "pages sent to another server (KV connectors, disaggregation)": (
        Works(VLLM + "test_transfer.py::test_pages_arrive_as_they_were"),
        Refused(_PAGES_REFUSED),
    ),
    "hierarchical cache": (None, Refused(_PAGES_REFUSED)),
}
