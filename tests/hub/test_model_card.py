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

import ast
import re

import pytest
import torch
from huggingface_hub import ModelCard

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, shapes
from trl_diffusion.hub import build_model_card
from trl_diffusion.hub.model_card import PAPERS, escape, hub_id


NASTY = "a \"red\" 'circle' ```\n---\n</code><script>alert(1)</script> | {{ 7 * 7 }} : # [x](y) *b* ~~~"


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", text, flags=re.DOTALL)


def code_block(card: ModelCard) -> str:
    return code_blocks(card.text)[0]


def test_card_of_a_lora_says_what_the_hub_needs():
    card = build_model_card(
        model_name="flux-chunk-grpo",
        pipeline_class="FluxPipeline",
        base_model="black-forest-labs/FLUX.1-dev",
        hub_model_id="alice/flux-chunk-grpo",
        dataset_name="alice/prompts",
        papers=("chunk_grpo", "dance_grpo", "flow_grpo"),
        rewards={"hpsv3": 1.0, "image_reward": 0.5},
        watched_rewards=["aesthetic"],
        settings={"num_generations": 12, "chunk_sizes": [2, 3, 4, 7]},
        call_arguments={"height": 720, "guidance_scale": 3.5},
        prompt="a fox in the snow",
        metrics={"base": {"hpsv3": (13.8, 13.7, 13.9)}, "aligned": {"hpsv3": (15.2, 15.1, 15.3)}},
        metrics_note="Measured on 400 prompts.",
        images={"before_after.png": "base above, aligned below"},
        tags=["flux"],
    )
    data = ModelCard(str(card)).data
    assert data.base_model == "black-forest-labs/FLUX.1-dev"
    assert data.base_model_relation == "adapter"
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "text-to-image"
    assert data.datasets == ["alice/prompts"]
    assert data.tags == [
        "text-to-image",
        "diffusers",
        "lora",
        "template:sd-lora",
        "trl",
        "trl_diffusion",
        "chunk-grpo",
        "flux",
    ]
    for line in (
        "# flux-chunk-grpo",
        "| hpsv3 | 1 |",
        r"| image\_reward | 0.5 |",
        r"| num\_generations | 12 |",
        r"| chunk\_sizes | \[2, 3, 4, 7\] |",
        "| hpsv3 | 13.8 (13.7 to 13.9) | 15.2 (15.1 to 15.3) |",
        "Measured during training but not trained: aesthetic.",
        "![base above, aligned below](before_after.png)",
    ):
        assert line in card.text.splitlines(), line
    assert "Measured on 400 prompts." in card.text
    for paper in ("chunk_grpo", "dance_grpo", "flow_grpo"):
        number, title, bibtex = PAPERS[paper]
        assert title in card.text and f"arXiv:{number}" in card.text and bibtex in card.text
    assert re.search(r"^- diffusers: \d+\.\d+", card.text, flags=re.MULTILINE)
    assert code_block(card).splitlines() == [
        "import torch",
        "from diffusers import FluxPipeline",
        "",
        'pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)',
        'pipe.load_lora_weights("alice/flux-chunk-grpo", weight_name="pytorch_lora_weights.safetensors")',
        'pipe.to("cuda")',
        "image = pipe(",
        '    prompt="a fox in the snow",',
        "    height=720,",
        "    guidance_scale=3.5,",
        ").images[0]",
    ]


def test_card_with_nothing_but_the_needed_is_whole():
    card = build_model_card(model_name="x", pipeline_class="FluxPipeline")
    data = ModelCard(str(card)).data
    assert data.base_model is None and data.datasets is None
    assert "None" not in str(card) and "{{" not in str(card).replace("title   = {{", "")
    ast.parse(code_block(card))


def test_card_of_the_embedded_model_runs_without_a_download():
    card = build_model_card(
        model_name="demo", pipeline_class="FluxPipeline", base_model="shapes", dataset_name="shapes"
    )
    assert ModelCard(str(card)).data.base_model is None
    assert "pipe = shapes.load_pipeline()" in code_block(card)
    assert "huggingface.co/shapes" not in str(card)


def test_card_of_a_whole_transformer():
    card = build_model_card(
        model_name="full",
        pipeline_class="FluxPipeline",
        base_model="black-forest-labs/FLUX.1-dev",
        hub_model_id="alice/full",
        transformer_class="FluxTransformer2DModel",
    )
    data = ModelCard(str(card)).data
    assert data.base_model_relation == "finetune"
    assert "lora" not in data.tags and "template:sd-lora" not in data.tags
    usage = code_block(card)
    calls = [node for node in ast.walk(ast.parse(usage)) if isinstance(node, ast.Call)]
    load = next(call for call in calls if ast.unparse(call.func) == "FluxTransformer2DModel.from_pretrained")
    assert load.args[0].value == "alice/full" and load.keywords[0].value.value == "transformer"
    assert "load_lora_weights" not in usage


def test_local_paths_stay_private(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alice" / "flux").mkdir(parents=True)
    for path in (str(tmp_path), "/home/alice/flux", "./flux", "../a/flux", "alice/flux", "C:\\Users\\alice\\flux"):
        assert hub_id(path) is None, path
        card = build_model_card(
            model_name="x", pipeline_class="FluxPipeline", base_model=path, hub_model_id=path, dataset_name=path
        )
        assert path not in str(card)
        ast.parse(code_block(card))


@pytest.mark.parametrize("field", ["model_name", "base_model", "hub_model_id", "dataset_name", "prompt", "reward"])
def test_no_name_or_prompt_can_break_the_card(field):
    values = {"model_name": "name", "pipeline_class": "FluxPipeline"}
    if field == "reward":
        values |= {"rewards": {NASTY: 1.0}, "watched_rewards": [NASTY], "settings": {NASTY: NASTY}}
        values |= {"metrics": {"base": {NASTY: (1, 1, 1)}, "aligned": {NASTY: (1, 1, 1)}}, "metrics_note": NASTY}
        values |= {"images": {"a.png": NASTY}}
    else:
        values[field] = NASTY
    values["tags"] = [NASTY]
    card = build_model_card(**values)

    loaded = ModelCard(str(card))
    assert loaded.data.tags[-1] == NASTY
    assert loaded.text.strip() == card.text.strip()  # the metadata block ends where it should
    outside = card.text
    for code in code_blocks(card.text):
        outside = outside.replace(code, "")
        ast.parse(code)
    assert "<script>" not in outside
    assert card.text.count("```") % 2 == 0
    assert len(re.findall(r"^## Citations$", card.text, flags=re.MULTILINE)) == 1
    for line in card.text.splitlines():
        if line.startswith("|"):
            columns = len(re.findall(r"(?<!\\)\|", line)) - 1
            assert columns in (2, 3), line


def test_prompt_of_the_example_is_the_prompt():
    prompt = 'a `quoted` "fox" and it\'s\tsnow \u2603'
    card = build_model_card(model_name="x", pipeline_class="FluxPipeline", prompt=prompt)
    calls = [node for node in ast.walk(ast.parse(code_block(card))) if isinstance(node, ast.Call)]
    strings = [keyword.value.value for call in calls for keyword in call.keywords if keyword.arg == "prompt"]
    assert prompt.replace("\t", " ") in strings


def test_the_examples_draw_what_the_trainer_draws(tmp_path):
    """The adapter, and the hybrid, twice: the second image must begin with the adapter again."""
    config = ChunkGRPOConfig(
        output_dir=str(tmp_path),
        height=32,
        width=32,
        num_inference_steps=6,
        sigma_shift=None,  # the pipeline's own schedule, as in the card
        num_generations=2,
        per_device_train_batch_size=2,
        chunk_sizes=[5],
        max_steps=2,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        save_strategy="no",
        log_samples=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = ChunkGRPOTrainer("shapes", "shapes-judge", config, shapes.load_dataset("train"))
    trainer.train()
    trainer.save_model()
    usage, hybrid = code_blocks((tmp_path / "README.md").read_text(encoding="utf-8"))
    names = {"torch": torch}

    def draw(code):
        seeded = code.replace(
            ").images", '    output_type="pt",\n    generator=torch.Generator().manual_seed(7),\n).images'
        )
        exec(seeded.replace("path/to/this/folder", str(tmp_path)), names)
        return names["image"]

    prompts = trainer.train_dataset["prompt"][:1]
    aligned, half, base = (trainer.generate(prompts, [7], fraction)[0] for fraction in (1.0, 0.6, 0.0))
    assert min((aligned - half).abs().max(), (half - base).abs().max()) > 0.01
    for code, expected in ((usage, aligned), (hybrid, half), (hybrid, half)):
        torch.testing.assert_close(draw(code), expected, rtol=0, atol=1e-5)
    drawn = draw(usage.partition("image = ")[1] + usage.partition("image = ")[2])
    torch.testing.assert_close(drawn, aligned, rtol=0, atol=1e-5)


def test_the_hybrid_is_that_of_a_lora_trained_with_chunk_grpo():
    for more in ({"papers": ["srpo"]}, {"transformer_class": "FluxTransformer2DModel"}):
        assert "disable_lora" not in str(build_model_card(model_name="x", pipeline_class="FluxPipeline", **more))


def test_the_examples_of_an_editing_model_load_an_image_and_keep_it():
    card = build_model_card(model_name="x", pipeline_class="FluxKontextPipeline", takes_image=True)
    assert card.data.pipeline_tag == "image-to-image" and "text-to-image" not in card.data.tags
    usage, hybrid = code_blocks(str(card))
    assert 'source = load_image("path/or/url/of/an/image")' in usage and "import load_image" in usage
    # Each draws from the source, and none from what was drawn before.
    assert usage.count("image=source") == hybrid.count("image=source") == 1


def test_the_distilled_model_and_the_one_that_it_is_distilled_from_are_both_named():
    arguments = {"model_name": "x", "pipeline_class": "FluxPipeline"}
    card = str(build_model_card(**arguments, base_model="alice/fast", undistilled_model="alice/slow"))
    assert "https://huggingface.co/alice/fast" in card and "distilled from [alice/slow]" in card
    card = str(build_model_card(**arguments, base_model="alice/slow", distilled_model="alice/fast"))
    assert "tried on [alice/fast](https://huggingface.co/alice/fast), which is distilled from the base" in card
    whole = build_model_card(**arguments, distilled_model="alice/fast", transformer_class="FluxTransformer2DModel")
    assert "alice/fast" not in str(whole)  # there is no adapter
    assert "distilled" not in str(build_model_card(**arguments))


def test_escape_keeps_plain_text():
    assert escape("a small red circle, 2 of 3") == "a small red circle, 2 of 3"


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"\['ppo'\].*chunk_grpo"):
        build_model_card(model_name="x", pipeline_class="FluxPipeline", papers=["ppo"])
    for name in ("/home/alice/a.png", "../a.png", "C:\\a.png"):
        with pytest.raises(ValueError, match="relative to the card"):
            build_model_card(model_name="x", pipeline_class="FluxPipeline", images={name: "picture"})


@pytest.mark.parametrize("paper", PAPERS)
def test_the_citation_is_of_the_paper_that_is_linked(paper):
    number, title, bibtex = PAPERS[paper]
    fields = dict(re.findall(r"^    (\w+) += \{(.+)\},?$", bibtex, flags=re.MULTILINE))
    assert (fields["title"], fields["journal"]) == (f"{{{title}}}", f"arXiv preprint arXiv:{number}")
    assert fields["year"] == f"20{number[:2]}" and " and " in fields["author"]
