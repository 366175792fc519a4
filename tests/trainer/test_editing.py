"""Training of models that edit images: the column `condition_image` on its way through the trainers."""

import io
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Value
from datasets import Image as ImageFeature
from huggingface_hub import cached_assets_path
from PIL import Image
from tiny_models import tiny_flux_kontext_pipeline

from trl_diffusion import ChunkGRPOConfig, SRPOConfig, SRPOTrainer
from trl_diffusion.data.prompt_images import PromptWithImage, prompt_of, with_image
from trl_diffusion.rewards import RewardModel
from trl_diffusion.trainer.construction_checks import check_datasets

from .conftest import EDITING, PIPELINES, PROMPTS, dataset_of, picture, redness, trainable


FAMILY = "flux-kontext"
both = pytest.mark.parametrize("family", EDITING)
# Each image has a negative prompt of its own, where there is one.
GUIDANCE = {"qwen-image-edit-plus": {"guidance_scale": 3.0, "negative_prompt": "dull"}}


class Brightness(RewardModel):
    name = "brightness"

    def score(self, images, prompts):
        assert all(isinstance(prompt, str) for prompt in prompts)
        return images.mean(dim=(1, 2, 3))


class Seen:
    """A reward that keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, images, prompts, condition_image):
        self.calls += zip(prompts, condition_image, strict=True)
        return redness(images, prompts)


def srpo(folder, dataset, model=None, **settings):
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "num_inference_steps": 3, "height": 16, "width": 16,
        "max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "cache_prompt_embeds": False, **settings,
    }  # fmt: skip
    return SRPOTrainer(model or tiny_flux_kontext_pipeline(), Brightness(), SRPOConfig(**settings), dataset)


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_rewards_get_the_picture_of_each_row(make_trainer):
    reward = Seen()
    trainer = make_trainer(
        FAMILY, [reward, Brightness()], max_steps=1, eval_dataset=dataset_of(FAMILY), num_eval_images=6
    )
    trainer.train()
    trainer.evaluate()
    assert len(reward.calls) == 8 + 2 * 6  # the evaluation scores the base model too
    for prompt, image in reward.calls:
        assert np.array_equal(image, picture(PROMPTS.index(prompt)))


def test_the_image_decides_what_is_drawn(make_trainer):
    trainer = make_trainer(FAMILY)
    prompts = [prompt_of(row) for row in trainer.train_dataset.select([0, 1])]
    # The same prompt and noise, on two of the dataset's images.
    same = with_image(prompts[0].text, trainer.train_dataset[0]["condition_image"])
    other = PromptWithImage(prompts[1].text, prompts[1].digest)  # without its picture it is still known
    first, again, second = trainer.generate([prompts[0], same, other], [3, 3, 3])
    assert torch.equal(first, again)
    assert (first - second).abs().max() > 1e-2


def written_entries():
    """The embeddings on disk: file and inode, which is another when the file is written again."""
    folder = cached_assets_path("trl_diffusion", "prompts", "embeddings")
    return {path: path.stat().st_ino for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("family", "form"),
    [*((FAMILY, form) for form in ("paths", "stream", "windows", "store")), ("qwen-image-edit-plus", "windows")],
)
def test_a_run_is_the_same_however_its_images_come(make_trainer, tmp_path, form, family):
    dataset, settings = dataset_of(family), {}
    make = partial(make_trainer, family, model=str(saved_model(tmp_path, family)), **GUIDANCE.get(family, {}))
    make = partial(make, optim="sgd", learning_rate=1.0)
    # A window pads prompts of different length further than a run that knows them all.
    atol = 1e-5 if family in GUIDANCE and form in ("windows", "stream") else 0
    if form == "paths":
        paths = []
        for i, image in enumerate(dataset["condition_image"]):
            paths.append(str(tmp_path / f"{i}.png"))
            image.save(paths[-1])
        other = Dataset.from_dict({"prompt": PROMPTS, "condition_image": paths})
    elif form == "stream":
        rows = [{"prompt": row["prompt"], "condition_image": row["condition_image"]} for row in dataset]
        other = IterableDataset.from_generator(lambda: iter(rows))
        assert other.features is None
    elif form == "windows":
        other, settings = dataset, {"prompt_window": 2}
    else:
        other, settings = dataset, {"cache_prompt_embeds": True}
        make(max_steps=1, **settings)  # fills the store
        entries = written_entries()
    if form == "stream":
        # Its order is its own: what is equal is the first generation.
        trainers = [make(train_dataset=each, max_steps=1) for each in (other, dataset)]
        rows = [row for row in dataset.select([4, 1]) for _ in range(4)]
        made = [trainer.make_micro_batches(rows, 0) for trainer in trainers]
        for pair in zip(*made, strict=True):
            torch.testing.assert_close(*(batch.clean for batch in pair), rtol=0, atol=atol)
        trainers[0].train()
        assert trainers[0].state.global_step == 1
        return
    trainer = make(train_dataset=other, **settings)
    trainer.train()
    if form == "store":
        assert entries and written_entries() == entries  # whatever is encoded is written anew
    truth = make()
    truth.train()
    torch.testing.assert_close(trainable(trainer), trainable(truth), rtol=0, atol=atol)


@both
def test_a_run_resumes_within_a_generation(make_trainer, tmp_path, family):
    settings = {
        "gradient_accumulation_steps": 1, "steps_per_generation": 4, "max_steps": 4, "save_strategy": "steps",
        "save_steps": 1, "save_total_limit": None,
    }  # fmt: skip
    # In windows, so that the resumed run must encode images again.
    settings |= {"model": str(saved_model(tmp_path, family)), "prompt_window": 2, **GUIDANCE.get(family, {})}
    whole = make_trainer(family, **settings)
    whole.train()
    for beta in (0.0, 0.1):
        resumed = make_trainer(family, **settings, output_dir=str(tmp_path / f"resumed-{beta}"), beta=beta)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        if beta == 0:
            assert_same(trainable(resumed), trainable(whole))
        else:  # the reference's means are made of the generation's images
            assert all("kl" in log for log in resumed.state.log_history if log.get("step", 0) > 2 and "loss" in log)


def test_evaluations_of_one_prompt_on_different_images_are_different(make_trainer, tmp_path):
    datasets = [
        Dataset.from_dict({"prompt": 2 * ["a cat"], "condition_image": [picture(i), picture(i + 1)]})
        for i in (0, 2, 0)
    ]
    trainer = make_trainer(FAMILY, Brightness(), model=str(saved_model(tmp_path)), num_eval_images=2)
    # The base model's images are drawn once a dataset.
    scores = [trainer.evaluate(dataset)["eval_base/reward"] for dataset in datasets]
    assert scores[0] == scores[2] != scores[1]
    assert len(trainer.evaluator._base_scores) == 2
    prompts, *_ = trainer.evaluator.compare(datasets[0])
    assert len(set(prompts)) == 2


def test_srpo_aligns_with_images_of_the_dataset(tmp_path):
    """The images to become and those to edit are two columns."""
    targets = [picture(10 + i, (16, 16)) for i in range(6)]
    dataset = Dataset.from_dict({**dataset_of(FAMILY)[:], "image": targets})
    trainer = srpo(tmp_path / "out", dataset, prompt_window=2, model=str(saved_model(tmp_path)))
    before = trainable(trainer)
    batch = trainer._prepare_inputs([trainer.train_dataset[i] for i in (0, 1)])
    assert [np.array_equal(p.open(), picture(i)) for i, p in enumerate(batch.prompts)] == [True, True]
    expected = trainer.flow.encode_image(torch.stack([to_tensor(image) for image in targets[:2]]))
    torch.testing.assert_close(batch.clean, expected, rtol=0, atol=1e-5)
    trainer._images_trained = 0
    trainer.train()
    assert any(not torch.equal(before[name], after) for name, after in trainable(trainer).items())


def saved_model(folder, family=FAMILY):
    PIPELINES[family]().save_pretrained(folder / "model")
    return folder / "model"


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def never_loaded(*args, **kwargs):
    raise AssertionError("weights were loaded")


class TestBadInput:
    @pytest.fixture
    def model(self, tmp_path, monkeypatch):
        folder = saved_model(tmp_path)
        monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", never_loaded)
        return str(folder)

    def test_no_column(self, make_trainer, model):
        with pytest.raises(
            ValueError, match="A FluxKontextPipeline edits images, and there is no condition_image. Add"
        ):
            make_trainer(model=model, train_dataset=dataset_of("flux"))

    def test_a_model_that_edits_none(self, make_trainer):
        message = (
            r"a FluxPipeline draws from prompts alone. Remove it, of a dataset by dataset.remove_columns\('condit"
        )
        with pytest.raises(ValueError, match=message):
            make_trainer("flux", train_dataset=dataset_of(FAMILY))

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (
                [picture(0), None],
                r"Row 1 of column 'condition_image' of train_dataset has no image. .*row\['condition_im",
            ),
            ([b"none", None], "image in row 0 of column 'condition_image' of train_dataset cannot be read: .*Replace"),
            ([Image.new("RGBA", (8, 8)), None], "Row 0 of column .* has an image with transparent pixels"),
        ],
    )
    def test_rows_without_a_usable_image_are_named(self, make_trainer, model, images, message):
        rows = [{"bytes": image, "path": None} if isinstance(image, bytes) else as_file(image) for image in images]
        features = Features({"prompt": Value("string"), "condition_image": ImageFeature()})
        dataset = Dataset.from_dict({"prompt": PROMPTS[:2], "condition_image": rows}, features=features)
        with pytest.raises(ValueError, match=message):
            make_trainer(model=model, train_dataset=dataset)

    def test_a_path_that_leads_nowhere(self, make_trainer, model):
        dataset = Dataset.from_dict({"prompt": PROMPTS[:2], "condition_image": 2 * ["nowhere.png"]})
        with pytest.raises(ValueError, match="image in row 0 of column 'condition_image' .*nowhere.png"):
            make_trainer(model=model, train_dataset=dataset)

    def test_another_type(self, make_trainer, model):
        dataset = Dataset.from_dict({"prompt": PROMPTS[:2], "condition_image": [3, 3]})
        with pytest.raises(ValueError, match="must be of type datasets.Image or hold paths, got .*int64.*cast_column"):
            make_trainer(model=model, train_dataset=dataset)

    def test_one_dataset_without(self, make_trainer, model):
        with pytest.raises(ValueError, match="train_dataset has a column 'condition_image' and eval_dataset has none"):
            make_trainer(model=model, train_dataset=dataset_of(FAMILY), eval_dataset=dataset_of("flux"))

    def test_an_evaluation_without(self, make_trainer):
        trainer = make_trainer(FAMILY)
        with pytest.raises(ValueError, match="there is no condition_image"):
            trainer.evaluate(dataset_of("flux"))

    def test_a_row_of_a_stream(self, make_trainer, tmp_path):
        rows = [{"prompt": prompt, "condition_image": None} for prompt in PROMPTS]
        stream = IterableDataset.from_generator(lambda: iter(rows))
        with pytest.raises(ValueError, match="The prompt 'a cat' has no image. Give a PIL.Image, a path"):
            make_trainer(FAMILY, train_dataset=stream, max_steps=1).train()

    @pytest.mark.parametrize("name", ["per_device_train_batch_size", "rollout_batch_size"])
    def test_batches_of_sharded_weights(self, tmp_path, monkeypatch, name):
        settings = {"per_device_train_batch_size": 1, "num_generations": 2, "gradient_accumulation_steps": 2, name: 2}
        config = ChunkGRPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
        check_datasets(config, dataset_of(FAMILY), None)
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(
            ValueError, match=f"{name}=2 with a column 'condition_image' and ZeRO-3 or FSDP.*Set {name}=1"
        ):
            check_datasets(config, dataset_of(FAMILY), None)
        check_datasets(config, dataset_of("flux"), None)


def as_file(image):
    if image is None:
        return None
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}
