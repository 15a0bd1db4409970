"""What is sampled, scored and clocked while training."""

import math

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2
from training import SHAPE, fit, make_trainer, read_lines, write_rows

from fc_lightning import callbacks
from fc_lightning.callbacks import (
    SampleCalls,
    Throughput,
    ValidateCalls,
    needed_flops,
    samples_as_markdown,
    samples_as_text,
)
from fc_lightning.calls import FunctionCall
from fc_lightning.datamodule import FunctionCallDataModule
from fc_lightning.module import FunctionCallModule
from fc_lightning.predictions import Prediction, predict_rows

LOCK = FunctionCall("lock_doors", {"lock_state": "lock"})
UNLOCK = FunctionCall("lock_doors", {"lock_state": "unlock"})
RIGHT = Prediction(0, "lock up", LOCK, "", LOCK, 0.9)
WRONG = Prediction(1, "lock | up", LOCK, "", UNLOCK, 0.5)
UNREADABLE = Prediction(2, "lock", LOCK, "lo\nck", None, 0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data"), 12, 5)


def test_a_sample_file_shows_input_actual_and_predicted():
    assert samples_as_text(500, [UNREADABLE, WRONG, RIGHT]) == (
        "step 500: 1 of 3 right\n"
        "\n"
        "x Input:     lock\n"
        "x Actual:    lock_doors(lock_state='lock')\n"
        "x Predicted: unreadable: 'lo ck'\n"
        "\n"
        "x Input:     lock | up\n"
        "x Actual:    lock_doors(lock_state='lock')\n"
        "x Predicted: lock_doors(lock_state='unlock')\n"
        "\n"
        "  Input:     lock up\n"
        "  Actual:    lock_doors(lock_state='lock')\n"
        "  Predicted: lock_doors(lock_state='lock')\n"
        "\n"
    )


def test_samples_in_markdown_are_a_table_that_no_command_breaks():
    lines = samples_as_markdown([WRONG, RIGHT]).splitlines()
    assert lines[0] == "1 of 2 right"
    assert r"lock \| up" in lines[4]
    cells = [line.replace(r"\|", "").count("|") for line in lines[2:]]
    assert len(set(cells)) == 1
    assert "**`lock_state='unlock'`**" in lines[4] and "**`lock" not in lines[5]


def test_samples_are_written_every_interval_once_a_step(tmp_path, data):
    samples = SampleCalls(sample_interval=2, num_samples=2)
    fit(tmp_path, data, max_epochs=2, accumulate_grad_batches=2, callbacks=[samples])
    for name in ("train_sample.txt", "val_sample.txt"):
        text = (tmp_path / "samples" / name).read_text()
        steps = [line.split(":")[0] for line in text.splitlines() if line.startswith("step")]
        assert steps == ["step 2", "step 4"]  # 3 batches an epoch: windows of 2 and 1
        assert text.count("Input:") == text.count("Actual:") == text.count("Predicted:") == 4
    with pytest.raises(ValueError, match="must be at least 1"):
        SampleCalls(sample_interval=0)


def test_sampling_leaves_training_as_it_is(tmp_path, data):
    plain = fit(tmp_path / "plain", data, max_epochs=1)
    sampled = fit(tmp_path / "sampled", data, max_epochs=1, callbacks=[SampleCalls(1, 2)])
    weights = [run.lightning_module.gpt.lm_head.weight for run in (plain, sampled)]
    assert torch.equal(*weights)
    assert sampled.lightning_module.training


@pytest.mark.parametrize(
    ("num_examples", "rows"), [(0, []), (2, [0, 4]), (3, [0, 2, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_validation_in_fit_scores_rows_spread_over_the_set(tmp_path, data, num_examples, rows):
    calls = ValidateCalls(num_examples)
    trainer = fit(tmp_path, data, max_epochs=1, callbacks=[calls])
    assert sorted(p.row for p in calls.predictions) == rows
    assert ("val/call_match" in trainer.callback_metrics) == bool(rows)


def test_validate_scores_every_row(tmp_path, data):
    calls = ValidateCalls(num_examples=1)
    trainer = make_trainer(tmp_path, callbacks=[calls])
    module = FunctionCallModule(**SHAPE)
    measures = trainer.validate(module, FunctionCallDataModule(str(data)), verbose=False)[0]
    assert len(calls.predictions) == 5
    assert measures["val/call_match"] == 0.0
    assert math.isfinite(measures["val/loss"])


def test_a_run_is_understandable_in_tensorboard_alone(tmp_path, data):
    logger = TensorBoardLogger(tmp_path, name="run")
    options = {"callbacks": [ValidateCalls(2), SampleCalls(3, 2), Throughput(1)], "logger": logger}
    fit(tmp_path, data, max_epochs=1, **options)
    events = EventAccumulator(logger.log_dir).Reload()
    scalars = set(events.Tags()[SCALARS])
    assert {"train/loss", "train/learning_rate", "train/examples_per_s", "val/loss"} <= scalars
    assert {"val/call_match", "val/argument_f1", "val_call_match/lock_doors"} <= scalars
    assert set(events.Tags()[IMAGES]) == {"val/confusion", "val/calibration"}
    assert events.SummaryMetadata("samples/val/text_summary")
    content = events.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    table = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
    measures = ["val/call_match", "val/function_match", "val/argument_f1", "val/loss"]
    assert [info.name.tag for info in table.metric_infos] == measures
    # TensorBoard shows the first five by alphabet.
    first = ["dropout", "learning_rate", "optimizer", "pretrained_dir", "rows_per_step"]
    assert sorted(info.name for info in table.hparam_infos)[:5] == first


class Clock:
    """Time stands still but for what is added to it."""

    def __init__(self, monkeypatch):
        self.seconds = 100.0
        monkeypatch.setattr(callbacks, "_now", lambda device: self.seconds)


def test_throughput_counts_real_tokens_by_the_time_of_training_alone(tmp_path, data, monkeypatch):
    clock = Clock(monkeypatch)
    seen = []

    class Timed(FunctionCallModule):
        def training_step(self, batch, batch_idx):
            clock.seconds += 0.5
            seen.append(batch)
            return super().training_step(batch, batch_idx)

        def on_validation_epoch_end(self):
            super().on_validation_epoch_end()
            clock.seconds += 1000

    class SlowSamples(SampleCalls):
        def _write(self, *args):
            clock.seconds += 77  # twice a sampling: for training and validation

    torch.manual_seed(0)
    trainer = make_trainer(
        tmp_path,
        max_epochs=2,
        callbacks=[SlowSamples(2, 1), Throughput(every_n_steps=3)],
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    datamodule = FunctionCallDataModule(str(data), batch_size=4)
    monkeypatch.setattr(callbacks, "get_available_flops", lambda device, dtype: 1e9)
    module = Timed(**SHAPE, lr_decay_iters=9)
    trainer.fit(module, datamodule)
    lines = [line for line in read_lines(tmp_path / "log.jsonl") if "train/tokens_per_s" in line]
    assert [line["step"] for line in lines] == [3, 6]
    for line, batches in zip(lines, (seen[:3], seen[3:]), strict=True):
        rows = [row for batch in batches for row in batch.rows]
        num_tokens = sum(int(datamodule.train_set.lengths[row]) - 1 for row in rows)
        assert line["train/examples_per_s"] == pytest.approx(12 / 1.5)
        assert line["train/tokens_per_s"] == pytest.approx(num_tokens / 1.5)
        flops = sum(3 * needed_flops(module, batch) for batch in batches)
        assert line["train/mfu"] == pytest.approx(flops / 1.5 / 1e9)


def test_needed_flops_are_those_of_rows_without_padding(data):
    module = FunctionCallModule(**SHAPE)
    datamodule = FunctionCallDataModule(str(data))
    datamodule.setup("fit")
    batch = datamodule.train_set[[0, 1]]
    prefix = len(batch.prefix)
    num_tokens = prefix + sum(batch.lengths)
    per_token = 2 * SHAPE["n_layer"] * 12 * SHAPE["n_embd"] ** 2
    pairs = sum(range(1, prefix + 1))
    pairs += sum(sum(range(prefix + 1, prefix + length + 1)) for length in batch.lengths)
    attention = 4 * SHAPE["n_layer"] * SHAPE["n_embd"] * pairs
    head = 2 * 50304 * SHAPE["n_embd"] * len(batch.targets)
    assert needed_flops(module, batch) == num_tokens * per_token + attention + head


def test_a_prediction_is_what_the_model_says_of_its_row(tmp_path, data):
    module = FunctionCallModule(**SHAPE)
    module.trainer = make_trainer(tmp_path)
    datamodule = FunctionCallDataModule(str(data))
    datamodule.setup("validate")
    together = predict_rows(module, datamodule.val_set, [0, 1, 4])
    alone = [predict_rows(module, datamodule.val_set, [row])[0] for row in (0, 1, 4)]
    assert [p.text for p in together] == [p.text for p in alone]
    assert [p.row for p in together] == [0, 1, 4]
    assert together[0].command == "play song 1000"
    assert together[0].expected == FunctionCall("play_music", {"track": "song 1000"})


def test_the_bar_of_a_run_that_goes_on_in_mid_epoch_knows_its_end(tmp_path):
    data = write_rows(tmp_path / "data", 16, 2)
    options = {"max_epochs": 9, "enable_progress_bar": True, "limit_val_batches": 0}
    fit(tmp_path, data, max_steps=2, callbacks=[callbacks.ProgressBar()], **options)
    bar = callbacks.ProgressBar()
    fit(tmp_path, data, max_steps=3, callbacks=[bar], ckpt_path="last", **options)
    assert bar.train_progress_bar.total == 4
    assert bar.train_progress_bar.desc == "Epoch 0: "
