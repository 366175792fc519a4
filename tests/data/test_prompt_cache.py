# Copyright 2026 The trl_diffusion authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import datasets
import pyarrow
import pytest
import torch
from tiny_models import tiny_flux_pipeline, tiny_qwen_image_pipeline, tiny_sd3_pipeline

from trl_diffusion.data.prompt_cache import PromptCache
from trl_diffusion.models import load_flow_model


PROMPTS = ["a red circle", "", "a blue square", "two Ünïcode ☃ words", "a green triangle on a white background"]


PIPELINES = {"sd3": tiny_sd3_pipeline, "qwen-image": tiny_qwen_image_pipeline}


@pytest.fixture(params=["flux", "flux-bfloat16", "sd3", "qwen-image"])
def flow_model(request):
    pipeline = PIPELINES.get(request.param, tiny_flux_pipeline)()
    if request.param == "flux-bfloat16":
        for module in (pipeline.text_encoder, pipeline.text_encoder_2):
            module.to(torch.bfloat16)
    flow_model = load_flow_model(pipeline)
    flow_model.max_sequence_length = 32 if request.param == "qwen-image" else 16
    return flow_model


@pytest.fixture
def flux():
    return load_flow_model(tiny_flux_pipeline())


def count_forwards(flow_model):
    """A list that grows by one with every forward of the T5 encoder."""
    calls = []
    *_, encoder = flow_model.text_encoders.values()
    encoder.register_forward_hook(lambda *_: calls.append(1))
    return calls


def arrow_files(folder):
    return sorted(Path(folder).rglob("*.arrow"))


@pytest.mark.parametrize("in_memory_only", [False, True])
def test_lookup_gives_what_the_encoders_give(flow_model, tmp_path, in_memory_only):
    cache = PromptCache.build(
        flow_model, PROMPTS + PROMPTS[:2], batch_size=2, cache_dir=tmp_path, in_memory_only=in_memory_only
    )
    assert len(cache) == len(PROMPTS)
    assert "a red circle" in cache and "a red circl" not in cache
    assert bool(arrow_files(tmp_path)) != in_memory_only

    wanted = [PROMPTS[i] for i in (4, 0, 0, 3, 1)]
    expected = flow_model.encode_prompt(wanted)
    actual = cache.get(wanted, device="cpu")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        tolerance = 1e-5 if tensor.dtype == torch.float32 else 2e-2  # other batch, other rounding
        torch.testing.assert_close(actual[name], tensor, rtol=tolerance, atol=tolerance)
    for name, tensor in cache[["a blue square"]].items():
        assert torch.equal(tensor, cache[["a red circle", "a blue square"]][name][1:])
    assert not torch.equal(*cache[["a red circle", "a blue square"]]["prompt_embeds"])


def test_same_batch_gives_the_same_bits(flow_model, tmp_path):
    prompts = sorted(PROMPTS)
    cache = PromptCache.build(flow_model, prompts, batch_size=len(prompts), cache_dir=tmp_path)
    for name, tensor in flow_model.collate(flow_model.encode_rows(prompts)).items():
        assert torch.equal(cache[prompts][name], tensor)


def test_encoders_run_once_for_each_distinct_prompt(flow_model, tmp_path):
    calls = count_forwards(flow_model)
    first = PromptCache.build(flow_model, PROMPTS * 3, batch_size=2, cache_dir=tmp_path)
    assert len(calls) == 3  # 5 distinct prompts, 2 a batch
    # Order and repetition do not matter; nor does freeing the encoders of the model the cache came from.
    second = PromptCache.build(flow_model, reversed(PROMPTS), batch_size=4, cache_dir=tmp_path)
    assert len(calls) == 3
    assert len(arrow_files(tmp_path)) == 1
    flow_model.free_text_encoders()
    for name, tensor in first[PROMPTS].items():
        assert torch.equal(second[PROMPTS][name], tensor)


def test_default_folder_is_that_of_datasets(flux):
    before = set(arrow_files(datasets.config.HF_DATASETS_CACHE))
    PromptCache.build(flux, ["only in the default folder"])
    assert len(set(arrow_files(datasets.config.HF_DATASETS_CACHE)) - before) == 1


def change_weight(flow_model):
    flow_model.text_encoders["text_encoder_2"].shared.weight.data[7, 3] += 1e-3


def change_two_biases(flow_model):
    bias = flow_model.text_encoders["text_encoder"].final_layer_norm.bias.data
    bias[0], bias[1] = 0.5, -0.5  # any checksum that only adds would miss it


def change_config(flow_model):
    flow_model.text_encoders["text_encoder"].config.layer_norm_eps = 1e-3


def change_length(flow_model):
    flow_model.max_sequence_length = 20


def change_dtype(flow_model):
    flow_model.text_encoders["text_encoder_2"].to(torch.bfloat16)


def change_tokenizer(flow_model):
    flow_model.tokenizers["tokenizer_2"].pad_token = "<unk>"


@pytest.mark.parametrize(
    "change",
    [change_weight, change_two_biases, change_config, change_length, change_dtype, change_tokenizer],
)
def test_whatever_changes_the_embeddings_changes_the_entry(flux, tmp_path, change):
    calls = count_forwards(flux)
    PromptCache.build(flux, PROMPTS, cache_dir=tmp_path)
    assert len(calls) == 1
    change(flux)
    cache = PromptCache.build(flux, PROMPTS, cache_dir=tmp_path)
    assert len(calls) == 2
    expected = flux.encode_prompt(PROMPTS)["prompt_embeds"]
    torch.testing.assert_close(cache[PROMPTS]["prompt_embeds"], expected, rtol=2e-2, atol=2e-2)
    PromptCache.build(flux, PROMPTS, cache_dir=tmp_path)
    assert len(calls) == 3  # the expectation above, and no more


def test_bfloat16_takes_two_bytes(tmp_path):
    pipeline = tiny_flux_pipeline()
    for module in (pipeline.text_encoder, pipeline.text_encoder_2):
        module.to(torch.bfloat16)
    flow_model = load_flow_model(pipeline)
    prompts = [f"prompt {i}" for i in range(64)]
    cache = PromptCache.build(flow_model, prompts, cache_dir=tmp_path)
    elements = sum(tensor.numel() for tensor in cache[prompts].values())
    size = arrow_files(tmp_path)[0].stat().st_size
    assert 2 * elements < size < 2.3 * elements


def test_negative_prompt_is_stored_once(tmp_path):
    flow_model = load_flow_model(tiny_sd3_pipeline())
    flow_model.max_sequence_length = 16
    prompts = [f"prompt {i}" for i in range(64)]
    cache = PromptCache.build(flow_model, prompts, cache_dir=tmp_path)
    elements = sum(tensor.numel() for name, tensor in cache[prompts].items() if not name.startswith("negative"))
    assert arrow_files(tmp_path)[0].stat().st_size < 4.3 * elements


def test_rows_are_stored_at_their_own_length_and_looked_up_at_one(tmp_path):
    flow_model = load_flow_model(tiny_qwen_image_pipeline())
    flow_model.negative_prompt = "dull"
    prompts = ["cat", "a very long prompt about a cat, " * 10]
    cache = PromptCache.build(flow_model, [*prompts, *(f"cat {i}" for i in range(60))], cache_dir=tmp_path)
    short, long = ({name: tensor[i] for name, tensor in cache[prompts].items()} for i in range(2))
    # The template adds 5 tokens behind the prompt, a byte of which is a token here.
    assert [row["prompt_embeds_mask"].sum().item() for row in (short, long)] == [8, 325]
    assert [row["negative_prompt_embeds_mask"].sum().item() for row in (short, long)] == [9, 9]
    assert short["prompt_embeds"].shape == long["prompt_embeds"].shape == (325, 32)
    assert torch.equal(short["prompt_embeds"], cache[["cat"]]["prompt_embeds"][0])
    assert not short["prompt_embeds"][8:].any() and short["prompt_embeds"][7].any()
    # Padded to one length, 63 rows would take 63 times the longest.
    assert arrow_files(tmp_path)[0].stat().st_size < 6 * 4 * long["prompt_embeds"].numel()


def test_lookup_reads_from_the_file_and_only_its_rows(flux, tmp_path):
    cache = PromptCache.build(flux, [f"prompt {i}" for i in range(300)], batch_size=100, cache_dir=tmp_path)
    before = pyarrow.total_allocated_bytes()
    cache[["prompt 7"]]
    row = 4 * sum(tensor.numel() for tensor in cache[["prompt 7"]].values())
    assert pyarrow.total_allocated_bytes() - before < 2 * row


def test_gradients_can_flow_past_cached_conditioning(flux, tmp_path):
    cache = PromptCache.build(flux, PROMPTS, cache_dir=tmp_path)
    latents = flux.draw_noise(2, 8, 8).requires_grad_()
    conditioning = cache[PROMPTS[:2]]
    flux.velocity(flux.denoiser, latents, torch.tensor(0.5), conditioning, 3.5).sum().backward()
    assert latents.grad.abs().sum() > 0


def test_unknown_prompt(flux):
    cache = PromptCache.build(flux, PROMPTS, in_memory_only=True)
    with pytest.raises(KeyError, match="'a red squirrel' is not in the cache of 5 prompts"):
        cache[["a red circle", "a red squirrel"]]


@pytest.mark.parametrize(("prompts", "message"), [([], "no prompts"), (["a", 3], "got 3 of type int")])
def test_bad_prompts(flux, tmp_path, prompts, message):
    calls = count_forwards(flux)
    with pytest.raises(ValueError, match=message):
        PromptCache.build(flux, prompts, cache_dir=tmp_path)
    assert not calls and not arrow_files(tmp_path)


def test_an_error_while_encoding_leaves_nothing_to_trust(flux, tmp_path):
    class Interruption(BaseException):
        pass

    calls = []

    def interrupt_second(*_):
        calls.append(1)
        if len(calls) == 2:
            raise Interruption

    handle = flux.text_encoders["text_encoder_2"].register_forward_hook(interrupt_second)
    with pytest.raises(Interruption):
        PromptCache.build(flux, PROMPTS, batch_size=2, cache_dir=tmp_path)
    handle.remove()
    assert not datasets.are_progress_bars_disabled()
    cache = PromptCache.build(flux, PROMPTS, batch_size=2, cache_dir=tmp_path)
    expected = flux.encode_prompt(PROMPTS)["prompt_embeds"]
    torch.testing.assert_close(cache[PROMPTS]["prompt_embeds"], expected, rtol=0, atol=1e-5)


SCRIPT = """
    import os, signal, sys
    import torch
    torch.set_num_threads(1)
    from accelerate import PartialState
    from tiny_models import tiny_flux_pipeline
    from trl_diffusion.data.prompt_cache import PromptCache
    from trl_diffusion.models import load_flow_model

    state = PartialState(cpu=True)
    assert state.num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    die_after = int(sys.argv[2])
    calls = []

    def count(*_):
        calls.append(1)
        if len(calls) == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    flow_model = load_flow_model(tiny_flux_pipeline())
    flow_model.text_encoders["text_encoder_2"].register_forward_hook(count)
    cache = PromptCache.build(flow_model, [f"prompt {i}" for i in range(8)], batch_size=2, cache_dir=sys.argv[1])
    print("forwards", len(calls), "sum", cache[[f"prompt {i}" for i in range(8)]]["prompt_embeds"].sum().item())
"""


def start(folder, die_after=0, **environment):
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]), **environment}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), str(die_after)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_build_then_two_processes(tmp_path):
    killed = start(tmp_path, die_after=3)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not [path for path in arrow_files(tmp_path) if "incomplete" not in str(path)]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [start(tmp_path, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    (_, forwards_0, _, sum_0), (_, forwards_1, _, sum_1) = (out.split() for out, _ in outputs)
    assert (forwards_0, forwards_1) == ("4", "0")
    assert sum_0 == sum_1
    assert "Encoding prompts" in outputs[0][1] and "Encoding prompts" not in outputs[1][1]


def test_lookup_is_fast(flux, tmp_path):
    prompts = [f"prompt {i}" for i in range(256)]
    cache = PromptCache.build(flux, prompts, batch_size=64, cache_dir=tmp_path)
    cache[prompts[:6]]
    best = float("inf")
    for repeat in range(10):
        begin = time.perf_counter()
        cache[[prompt for prompt in prompts[6 * repeat : 6 * repeat + 6] for _ in range(8)]]
        best = min(best, time.perf_counter() - begin)
    assert best < 0.02  # about a millisecond on an idle machine
