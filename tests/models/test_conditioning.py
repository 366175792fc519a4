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

"""Embeddings in windows: what the encoders give, for those prompts that come next, in bounded memory."""

import inspect
import itertools
import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image
from tiny_models import (
    tiny_flux_kontext_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_image_edit_plus_pipeline,
    tiny_sana_pipeline,
    tiny_sd3_pipeline,
)

from trl_diffusion.data.prompt_images import with_image
from trl_diffusion.data.prompt_store import PromptStore
from trl_diffusion.models import Conditioning, load_flow_model, open_prompt_store


PROMPTS = ["a red circle", "", "a blue square", "two Ünïcode ☃ words", "a green triangle on a white background"]
CPU = torch.device("cpu")


@pytest.fixture(params=["flux", "flux-bfloat16", "sd3"])
def flow_model(request):
    pipeline = tiny_sd3_pipeline() if request.param == "sd3" else tiny_flux_pipeline()
    if request.param == "flux-bfloat16":
        for module in (pipeline.text_encoder, pipeline.text_encoder_2):
            module.to(torch.bfloat16)
    flow_model = load_flow_model(pipeline)
    flow_model.max_sequence_length = 16
    return flow_model


@pytest.fixture
def flux():
    return load_flow_model(tiny_flux_pipeline())


def encoded(flow_model):
    """A list that grows by one with every forward of the T5 encoder."""
    calls = []
    *_, encoder = flow_model.text_encoders.values()
    encoder.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_the_conditioning_is_what_the_pipeline_encodes(flow_model):
    conditioning = Conditioning(flow_model, CPU)
    wanted = [PROMPTS[i] for i in (4, 0, 0, 3, 1)]
    expected = flow_model.encode_prompt(wanted)
    actual = conditioning.get(wanted)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        tolerance = 1e-5 if tensor.dtype == torch.float32 else 2e-2  # other batch, other rounding
        torch.testing.assert_close(actual[name], tensor, rtol=tolerance, atol=tolerance)
    assert not torch.equal(*conditioning.get(["a blue square", "a red circle"])["prompt_embeds"])


def test_text_encoders_may_stay_where_they_are(flow_model):
    """Of two devices: a tensor on the device of the network here holds nothing, so what is encoded was so on the CPU."""
    expected = Conditioning(flow_model, CPU).get(PROMPTS[:2])
    conditioning = Conditioning(flow_model, torch.device("meta"), encoder_device=CPU)
    actual = conditioning.get(PROMPTS[:2])
    assert {tensor.device.type for tensor in actual.values()} == {"meta"}
    assert {name: tensor.shape for name, tensor in actual.items()} == {n: t.shape for n, t in expected.items()}
    # The encoders are as they were.
    again = Conditioning(flow_model, CPU).get(PROMPTS[:2])
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("keep", [True, False])
def test_a_prompt_that_is_the_negative_prompt_too_is_encoded_as_both(keep, tmp_path):
    """Sana's pipeline puts an instruction before a prompt, and none before the negative one."""
    pipeline = tiny_sana_pipeline()
    flow_model = load_flow_model(pipeline, negative_prompt="Dull")
    flow_model.max_sequence_length = 16
    conditioning = Conditioning(flow_model, CPU, store=PromptStore(tmp_path, "tiny", 1))
    instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
    expected = pipeline.encode_prompt(
        ["Dull"], negative_prompt="Dull", max_sequence_length=16, complex_human_instruction=instruction
    )
    assert not torch.equal(expected[0], expected[2])
    if keep:
        conditioning.keep_all(["Dull"])
    actual = conditioning.get(["Dull"])
    names = ["prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"]
    for name, tensor in zip(names, expected, strict=True):
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-5)


def test_a_row_does_not_depend_on_the_rows_beside_it(flow_model):
    def first_row(*others, **arguments):
        conditioning = Conditioning(load_flow_model(flow_model.pipeline), CPU, **arguments)
        conditioning.flow_model.max_sequence_length = 16
        return {name: tensor[0] for name, tensor in conditioning.get([PROMPTS[0], *others], PROMPTS).items()}

    alone = first_row(window=1)
    for others, window in (((), 5), (PROMPTS[1:], 2), (PROMPTS[:0:-1], 5)):
        for name, tensor in first_row(*others, window=window).items():
            assert torch.equal(tensor, alone[name])


def test_a_window_follows_what_comes_next_and_lets_go_of_the_rest(flux):
    calls = encoded(flux)
    conditioning = Conditioning(flux, CPU, window=3)
    order = [f"prompt {i}" for i in range(8)]
    position = 0
    conditioning.upcoming = lambda: itertools.cycle(order[position:] + order[:position])
    for position in range(8):
        conditioning.get([order[position]] * 4)
        assert len(calls) == min(8 + 1, 3 * (position // 3 + 1))  # the last window has begun anew with prompt 0
        assert len(conditioning._window) == 3
    position = 0
    conditioning.get(["prompt 0", "prompt 7"])  # both are in the last window
    assert len(calls) == 9
    conditioning.get([f"prompt {i}" for i in range(5)])  # more at a time than a window has
    assert len(conditioning._window) == 5
    assert len(calls) == 9 + 4


def test_fewer_prompts_than_a_window_come_to_an_end(flux):
    conditioning = Conditioning(flux, CPU, window=10)
    conditioning.upcoming = lambda: itertools.cycle(PROMPTS)
    conditioning.get(PROMPTS[:1])
    assert conditioning._window.keys() == set(PROMPTS)


def test_what_is_kept_stays_through_all_windows(flux):
    calls = encoded(flux)
    conditioning = Conditioning(flux, CPU, window=2)
    conditioning.keep(["kept", "kept too", "kept"])
    for i in range(6):
        conditioning.get([f"prompt {i}"])
    conditioning.get(["kept", "kept too", "prompt 5"])
    assert len(calls) == 2 + 6


def test_text_encoders_are_on_the_device_while_they_run_and_on_the_cpu_after(flux):
    class Interruption(BaseException):
        pass

    with pytest.raises(Interruption), flux.text_encoders_on(torch.device("meta")):
        assert {module.device.type for module in flux.text_encoders.values()} == {"meta"}
        for module in flux.text_encoders.values():  # a meta tensor cannot be copied back
            module.to_empty(device="meta").to_empty(device="cpu")
        raise Interruption
    assert {module.device.type for module in flux.text_encoders.values()} == {"cpu"}


def test_text_encoders_can_stay_on_the_cpu(flux):
    """The conditioning goes where it is used: here to a device that has no memory to encode in."""
    conditioning = Conditioning(flux, torch.device("meta"), encoder_device=CPU)
    kept = conditioning.get(PROMPTS[:2])
    assert {tensor.device.type for tensor in kept.values()} == {"meta"}
    expected = flux.encode_prompt(PROMPTS[:2])
    assert {name: tensor.shape for name, tensor in kept.items()} == {n: t.shape for n, t in expected.items()}
    for i, prompt in enumerate(PROMPTS[:2]):
        for name, tensor in conditioning._window[prompt].items():
            torch.testing.assert_close(tensor, expected[name][i], rtol=1e-5, atol=1e-5)


def test_all_prompts_kept_frees_the_encoders(flow_model):
    expected = {prompt: flow_model.encode_prompt([prompt]) for prompt in PROMPTS}
    conditioning = Conditioning(flow_model, CPU)
    conditioning.keep_all(PROMPTS + PROMPTS[:2])
    assert not flow_model.text_encoders and flow_model.pipeline.text_encoder is None
    for prompt, row in expected.items():
        for name, tensor in conditioning.get([prompt]).items():
            # The pipeline's batch has the negative prompt beside it, where there is one.
            torch.testing.assert_close(tensor, row[name], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="'a red squirrel' was not among .* Pass its dataset"):
        conditioning.get(["a red circle", "a red squirrel"])
    with pytest.raises(ValueError, match="'a red squirrel'"):
        conditioning.check_available(["a red circle", "a red squirrel"])


def test_gradients_flow_past_the_conditioning(flux):
    latents = flux.draw_noise(2, 8, 8).requires_grad_()
    conditioning = Conditioning(flux, CPU).get(PROMPTS[:2])
    flux.velocity(flux.denoiser, latents, torch.tensor(0.5), conditioning, 3.5).sum().backward()
    assert latents.grad.abs().sum() > 0


# ---- On disk ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_flux_pipeline().save_pretrained(folder)
    return folder


def test_all_found_loads_no_text_encoder_and_reads_none_of_its_weights(folder, tmp_path):
    def conditioning_of_a_run():
        flow_model = load_flow_model(folder)
        assert not flow_model.text_encoders  # until they are needed
        return Conditioning(flow_model, CPU, store=open_prompt_store(flow_model, max_gib=1))

    first = conditioning_of_a_run().get(PROMPTS)
    for weights in [*folder.glob("text_encoder*/*.safetensors")]:
        status = weights.stat()
        content = weights.read_bytes()
        weights.write_bytes(bytes(len(content)))
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = conditioning_of_a_run()
    second = again.get(PROMPTS)
    assert not again.flow_model.text_encoders
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    again.keep_all(PROMPTS)
    with pytest.raises(Exception, match="(?i)header"):  # one prompt more, and the zeros are read
        again.get(["a prompt that was not encoded"])


def keys_differ(one, other):
    return open_prompt_store(one, 1).key != open_prompt_store(other, 1).key


def test_a_folder_with_other_files_has_other_entries(folder, tmp_path):
    flow_model = load_flow_model(folder)
    assert not keys_differ(flow_model, load_flow_model(folder))
    assert keys_differ(flow_model, load_flow_model(folder, torch_dtype=torch.bfloat16))
    before = open_prompt_store(flow_model, 1).key
    os.utime(folder / "tokenizer" / "tokenizer.json")
    assert open_prompt_store(load_flow_model(folder), 1).key != before
    flow_model.max_sequence_length = 20
    assert keys_differ(flow_model, load_flow_model(folder))


def change_weight(flow_model):
    flow_model.text_encoders["text_encoder_2"].shared.weight.data[7, 3] += 1e-3


def change_two_biases(flow_model):
    bias = flow_model.text_encoders["text_encoder"].final_layer_norm.bias.data
    bias[0], bias[1] = 0.5, -0.5  # any checksum that only adds would miss it


def change_config(flow_model):
    flow_model.text_encoders["text_encoder"].config.layer_norm_eps = 1e-3


def change_dtype(flow_model):
    flow_model.text_encoders["text_encoder_2"].to(torch.bfloat16)


def change_tokenizer(flow_model):
    flow_model.tokenizers["tokenizer_2"].pad_token = "<unk>"


@pytest.mark.parametrize("change", [change_weight, change_two_biases, change_config, change_dtype, change_tokenizer])
def test_whatever_changes_the_embeddings_of_a_loaded_pipeline_changes_the_entries(change):
    changed = load_flow_model(tiny_flux_pipeline())
    assert not keys_differ(load_flow_model(tiny_flux_pipeline()), changed)
    change(changed)
    assert keys_differ(load_flow_model(tiny_flux_pipeline()), changed)


def test_an_error_while_encoding_leaves_whole_entries_alone(flux, tmp_path):
    class Interruption(BaseException):
        pass

    calls = []

    def interrupt_third(*_):
        calls.append(1)
        if len(calls) == 3:
            raise Interruption

    handle = flux.text_encoders["text_encoder_2"].register_forward_hook(interrupt_third)
    store = PromptStore(tmp_path, "key", 1)
    with pytest.raises(Interruption):
        Conditioning(flux, CPU, store=store).get(PROMPTS)
    handle.remove()
    assert [prompt in store for prompt in PROMPTS] == [True, True, False, False, False]
    calls = encoded(flux)
    actual = Conditioning(flux, CPU, store=store).get(PROMPTS)["prompt_embeds"]
    assert len(calls) == 3
    torch.testing.assert_close(actual, flux.encode_prompt(PROMPTS)["prompt_embeds"], rtol=0, atol=1e-5)


# ---- At real size, and on several processes ----


MEMORY = """
    import psutil
    import torch
    from tiny_models import tiny_flux_pipeline
    from transformers import T5Config, T5EncoderModel
    from trl_diffusion.models import Conditioning, load_flow_model

    torch.set_num_threads(1)
    pipeline = tiny_flux_pipeline()
    config = T5Config(
        vocab_size=len(pipeline.tokenizer_2), d_model=4096, d_kv=8, d_ff=8, num_layers=1, num_heads=1
    )  # FLUX.1's embedding of a prompt: 512 x 4096 in bfloat16
    pipeline.text_encoder_2 = T5EncoderModel(config).to(torch.bfloat16).eval()
    pipeline.tokenizer_2.model_max_length = 512
    flow_model = load_flow_model(pipeline)
    (row,) = flow_model.encode_rows(["a cat"])
    assert row["prompt_embeds"].shape == (512, 4096) and row["prompt_embeds"].dtype == torch.bfloat16
    conditioning = Conditioning(flow_model, torch.device("cpu"), window=24)
    before = psutil.Process().memory_info().rss
    for window in range(3):
        conditioning.upcoming = lambda window=window: (f"prompt {24 * window + i}" for i in range(24))
        conditioning.get([f"prompt {24 * window}"])
        print("held", (psutil.Process().memory_info().rss - before) / 2**20)
"""


def test_memory_over_three_windows_at_the_size_of_flux():
    # In a process of its own, whose heap has no room left by other tests, and with an allocator that gives back at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY)], env=environment, capture_output=True, text=True, timeout=250
    )
    assert run.returncode == 0, run.stderr
    held = [float(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("held")]
    # A window is 96 MiB, and a second one beside it would be as much again.
    assert held[0] > 90 and max(held) < held[0] + 48 < 250, held


SCRIPT = """
    import os, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from accelerate import PartialState
    from tiny_models import tiny_flux_pipeline
    from trl_diffusion.data.prompt_store import PromptStore
    from trl_diffusion.models import Conditioning, load_flow_model

    state = PartialState(cpu=True)
    assert state.num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    kill_after = int(sys.argv[2])
    calls = []

    def count(*_):
        calls.append(1)
        if len(calls) == kill_after:
            os.kill(os.getpid(), 9)

    flow_model = load_flow_model(tiny_flux_pipeline())
    flow_model.text_encoders["text_encoder_2"].register_forward_hook(count)
    store = PromptStore(Path(sys.argv[1]), "key", 1)
    conditioning = Conditioning(flow_model, torch.device("cpu"), store=store)
    prompts = [f"prompt {i}" for i in range(9)]
    conditioning.keep_all(prompts)
    print("forwards", len(calls), "sum", conditioning.get(prompts)["prompt_embeds"].sum().item())
    if state.num_processes > 1:
        torch.distributed.destroy_process_group()
"""


def start(folder, kill_after=0, **environment):
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), str(kill_after)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_while_encoding_then_two_processes_with_half_of_the_rest_each(tmp_path):
    killed = start(tmp_path, kill_after=3)
    killed.communicate(timeout=120)
    assert killed.returncode == -9
    store = PromptStore(tmp_path, "key", 1)
    assert [f"prompt {i}" in store for i in range(9)] == 2 * [True] + 7 * [False]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [start(tmp_path, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    (_, forwards_0, _, sum_0), (_, forwards_1, _, sum_1) = (out.splitlines()[-1].split() for out, _ in outputs)
    assert (forwards_0, forwards_1) == ("4", "3")
    assert sum_0 == sum_1
    assert "Encoding prompts" in outputs[0][1] and "Encoding prompts" not in outputs[1][1]


def test_another_vae_has_other_entries_where_images_are_encoded():
    def key(build, changed):
        pipeline = build()
        with torch.no_grad():
            pipeline.vae.encoder.conv_in.bias += changed
        return open_prompt_store(load_flow_model(pipeline), 1).key

    assert key(tiny_flux_kontext_pipeline, 0) == key(tiny_flux_kontext_pipeline, 0)
    assert key(tiny_flux_kontext_pipeline, 0) != key(tiny_flux_kontext_pipeline, 1)
    assert key(tiny_flux_pipeline, 0) == key(tiny_flux_pipeline, 1)


@pytest.mark.parametrize(("build", "differs"), [(tiny_flux_kontext_pipeline, True), (tiny_flux_pipeline, False)])
def test_a_folder_with_another_vae_has_other_entries_where_images_are_encoded(tmp_path, build, differs):
    build().save_pretrained(tmp_path)
    before = open_prompt_store(load_flow_model(tmp_path), 1).key
    os.utime(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", (1, 1))
    assert (open_prompt_store(load_flow_model(tmp_path), 1).key != before) == differs


def test_negative_prompts_of_images_come_and_go_with_their_window():
    """Guidance leads away from the negative prompt on the very image that is edited."""
    flow_model = load_flow_model(tiny_qwen_image_edit_plus_pipeline(), negative_prompt="dull")
    images = [Image.new("RGB", size, "red") for size in ((40, 21), (33, 34), (20, 44), (30, 30))]
    prompts = [with_image("a cat", image) for image in images]
    conditioning = Conditioning(flow_model, CPU, window=2)
    conditioning.upcoming = lambda: iter(prompts)
    for i in (0, 2, 1, 3):
        actual, expected = conditioning.get(prompts[i : i + 1]), flow_model.encode_prompt(prompts[i : i + 1])
        assert actual.keys() == expected.keys()
        for name in ("image_latents", "negative_image_latents", "image_size", "negative_image_size"):
            torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-5)
        length = expected["negative_prompt_embeds"].shape[1]
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            torch.testing.assert_close(actual[name][:, :length], expected[name], rtol=0, atol=1e-5)
        assert len(conditioning._window) == 4  # two prompts and what leads away from each
    # No picture waits in memory for what is encoded.
    assert all(prompt.image is None for prompt in conditioning._encoded(prompts[:1]))
