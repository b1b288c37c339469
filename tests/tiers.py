# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tests that get the markers `slow` and `nightly` by their names, besides those that carry `slow`: file -> regular expression.

The default tier keeps at least one test of every kind and takes under 8 minutes on two cores. A test belongs here if it takes
more than about 8 seconds there and a faster test of its kind stays, or if it needs PyTorch, several processes or a browser.
"""

import re

SLOW = {
    "distributed/test_processes.py": "",
    "scripts/stress/test_resume.py": "",
    "scripts/stress/test_sharding.py": "",
    "scripts/launch/test_supervise.py": r"ray|two",
    "test_version_1_0.py": "",
    "test_journey.py": r"test_commands|another_mesh|finished_run|consecutive|weights_of_another",
    "sample/test_memory.py": "",
    "sample/engine/test_decoder_only.py": (
        r"31_others|mesh0|prefix_cache_reuses|top_logprobs|growing|long_prompt|first_tokens|share_the_prompt|cancelled"
        r"|without\[(one-kv-head|learned|bfloat16|local-first|banded|rope-interleaved|none|alibi|t5"
        r"|reordered-norm|gemma2|falcon-alibi|per-head-norm|position-offset)\]|longrope"
    ),
    "train/test_step.py": (
        r"norms_by_layer|spike|\(8, 1, 1\)|\(1, 8, 1\)|\(1, 1, 4\)|with_experts|\[nan-2\]"
        r"|dropout_differs|aux_loss_per_sequence|each_expert_as_a_matrix|\[mesh\]|\[inf-2\]"
    ),
    "checkpoint/test_object_store_backend.py": r"fifty_random|here_to_there|one_fault_of_each|killed_before|uploads_of_a_run",
    "checkpoint/test_object_stores.py": r"resumes_in_the_store|\[gs\]",
    "checkpoint/test_store.py": r"a_hundred_saves",
    "serve/test_chat_server.py": "",
    "serve/test_converted_server.py": "",
    "serve/test_server.py": r"openai_client",
    "corpus/test_ray.py": "",
    "corpus/test_slurm.py": "",
    "corpus/test_bench_corpus.py": "",
    "corpus/test_filters.py": r"quality_filter",
    "corpus/test_build_corpus.py": r"rebuilds_only|killed_build",
    "data/test_loader.py": r"every_stretch",
    "evaluate/test_evaluation.py": r"the_program_generate|interrupted|the_program_give",
    "evaluate/test_harness_model.py": r"harness_client|likelihoods_are",
    "evaluate/test_scaling.py": r"runs_are_compared",
    "plan/test_decoding.py": r"are_the_engines|encoder_decoder|both_programs|flops_per_token",
    "plan/test_search.py": r"count_active_experts|of_their_own_width|best_of_eight",
    "convert/test_conversion.py": (
        r"other_folders|6b_parameters|killed.*huggingface|carried_along|cast_is_reported|kept_unless|model_that_samples"
        r"|wrong_tensor_map"
    ),
    "sample/engine/test_encoder_decoder.py": r"full_forward|alone_equals|\[switch|a_mesh|quantized|generates\[t5\]",
    "sample/engine/test_speculative.py": r"warm_up|other-options3|prompt-lookup-options0|same-options1|end_at_seq_len",
    "sample/engine/test_warmup.py": r"\[496|\[240|a_conversation",
    "sample/engine/test_weights.py": r"int8_on_a_mesh|int8_weights_equal",
    "sample/test_loading.py": r"draft_model_may_differ|draft-model-0.0|encoder_decoder_models|prompt-lookup-",
    "sample/test_repl.py": r"real_terminal|draft_tokens",
    "sample/test_text_generation.py": r"speculatively|prints_json",
    # every mesh with every form of dispatch; the default tier has one of them
    "model/moe/test_layer.py": (
        r"sharded_equals(?!.*{'expert': 2, 'tensor': 2, 'fsdp': 2}-capacity)|equals_saved\[(dots|attention)\]"
        r"|layer_interval_alternates|cached_equals_full\[{'layer_interval'|dropless_equals_a_large_capacity.*2}|over_microbatches"
        r"|equals_saved\[full\]"
    ),
    "model/test_encoder.py": r"cached_equals_full\[(True-experts|False-dense)\]",
    "model/test_transformer.py": r"equal_scanned\[{'remat': '(dots|attention)'}\]",
    "evaluate/test_loglikelihood.py": r"batch_size_changes_nothing\[200\]|experts_have_no_capacity|mesh_changes_nothing",
    "model/test_reference.py": r"transformers|golden\[(switch|t5|gemma2)\]",
    "convert/huggingface/test_reference.py": r"transformers",
    "convert/huggingface/test_reader.py": r"transformers",
    "test_docs_commands.py": r"generated_pages",
    "convert/test_model_cache.py": r"converted_once",
    "convert/gguf/test_writer.py": r"interrupted|types_of_tensors|exact\[(llama-gqa|gpt-neox|gemma2|mixtral|gpt-neox-serial)\]",
    "convert/gguf/test_reader.py": r"to_hugging_face",
    "convert/gptj/test_reader.py": r"command_reshards",
    "train/test_pipeline.py": r"memory_of_1f1b|one_device\[gpipe\]",
    "test_library.py": r"resumes_and_returns|equals_the_program",
    "train/test_loop.py": r"survives_disk_errors",
    "model/moe/test_router.py": r"a_stack_of_their_own",
    "data/test_chat_template.py": r"macro",
    "model/attention/test_latent.py": r"full\[True\]",
    "model/test_encoder_heads.py": r"influence\[all-choices\]",
    "test_mesh.py": r"one_device\[(sizes5|sizes8|sizes2|sizes6|sizes7|sizes9|sizes3)-",
    "sample/test_encoder.py": r"a_mesh|batch\[roberta\]",
}


# Further cells of matrices, whose other cells stay in the slow tier, which .ci/run runs; these run with -m slow or -m nightly.
NIGHTLY = {
    "scripts/stress/test_sharding.py": r"tied\]|norm of|sinks|two rotations|fsdp=2 context=2",
    "test_docs_commands.py": r"\[docs/(experts|encoder_decoder|evaluation|getting_started/one_gpu)\.md\]",
    "train/test_step.py": (
        r"with_experts(?!.*'fsdp': 2.*shared_expert)|as_a_matrix\[adafactor|on_a_mesh_equal_one_device\[\((8, 1, 1|1, 8, 1)\)"
    ),
    "model/moe/test_layer.py": r"sharded_equals_one_device\[{('fsdp': 8|'tensor': 8|'data': [28]|'context': 4|'expert': [24])",
    "model/test_encoder_heads.py": r"gradients_on_a_mesh.*(data[48]|data2-fsdp2|context2.*-bert|fsdp4.*-all)",
    "convert/huggingface/test_bert.py": (
        r"gelu|\[(RobertaModel|BertModel|BertForPreTraining|AlbertForSequenceClassification)-default"
    ),
    "convert/huggingface/test_families.py": (
        r"\[(t5-v1\.1-tied|mt5-tied|t5-buckets|ul2|falcon-7b-bias-untied|falcon-11b|bloom-untied|mpt-clipped"
        r"|opt-without-biases|starcoder-unscaled)\]"
    ),
    "convert/huggingface/test_qwen_moe.py": r"\[(qwen2-moe-every-second|deepseek-v2)\]",
    "convert/gguf/test_writer.py": r"\[gpt-neox-serial\]",
    "sample/engine/test_warmup.py": r"\[496",
    "plan/test_search.py": r"layer_interval",
}


def is_slow(nodeid: str) -> bool:
    """Return whether the table gives a test of this ID the marker `slow`."""
    return _is_in(SLOW, nodeid)


def is_nightly(nodeid: str) -> bool:
    """Return whether a slow test of this ID also gets the marker `nightly`."""
    return _is_in(NIGHTLY, nodeid)


def _is_in(table: dict[str, str], nodeid: str) -> bool:
    file, _, name = nodeid.partition("::")
    pattern = table.get(file.removeprefix("tests/"))
    return pattern is not None and (not pattern or re.search(pattern, name) is not None)
