"""What is said of an exported lip reader: fields for programs, a model card for people.

Letters of the shape suffixes: B clips, T frames, S side of a crop in pixels, C words (classes).
"""

import dataclasses
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lipprep.stages.untrusted import markdown, printable, read_text
from lipprep.train.checkpoint import BEST, Checkpoint
from lipprep.train.config import Config, config_from
from lipprep.train.device import new_model
from lipprep.train.licence import is_of_lrw
from lipprep.train.models import LipReader, complete
from lipprep.train.published import configuration_beside

_MAX_RESULTS = 1 << 24  # bytes
_SHOWN = 8  # words
_WITHIN = "of these, those from 0 to T - 1"
# Settings of the reading, which are told apart from those of training.
_READING = ("crop_size", "mean", "std", "subtract_mean_frame", "mean_frame_gain")
# The frames of a clip's T in which its word is said, by the name of the formula (lipprep.train.boundary).
BOUNDARIES = {
    "mpc001": "m - h - 1 to m + h, where m is (T - 1) // 2, h is int(d / 2 * {fps:g}) and d the word's duration in "
    f"seconds; the word stands in the clip's middle; {_WITHIN}",
    "vipl": "int(T / 2 - h) to int(T / 2 + h) - 1, where h is d / 2 * {fps:g} and d the word's duration in seconds; "
    f"the word stands in the clip's middle; {_WITHIN}",
    "times": "floor(a * {fps:g}) to ceil(b * {fps:g}) - 1, where a and b are the seconds from the clip's first frame "
    f"at which the word begins and ends; {_WITHIN}",
}


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a program needs to know to run a lip reader, in plain containers.

    `boundary` is None where it takes none, `temperature` and `threshold` where it is not calibrated.
    """
    config = config_from(checkpoint.config)
    options, formula = config.augment, config.model.get("boundary")
    return {
        "lipprep": metadata.version("lipprep"),
        "recipe": config.recipe,
        "model": complete(config.model),
        "labels": checkpoint.labels,
        "profile": checkpoint.profile,
        "parameters": checkpoint.parameters,
        "fps": checkpoint.fps,
        "crop_size": options.crop_size,
        "mean": options.mean,
        "std": options.std,
        "subtract_mean_frame": options.subtract_mean_frame,
        "mean_frame_gain": options.mean_frame_gain,
        "normalise": "\n".join(normalising(checkpoint)),
        "temperature": checkpoint.temperature,
        "threshold": checkpoint.threshold,
        "boundary": formula,
        "boundary_frames": None if formula is None else BOUNDARIES[formula].format(fps=checkpoint.fps),
    }


def normalising(checkpoint: Checkpoint) -> list[str]:
    """Three lines of numpy from `crop` to `video`, (1, 1, T, S, S).

    `crop` is (T, N, N) uint8 as the shards have it, N being the `crop_size` of their parameters.
    """
    options, size = config_from(checkpoint.config).augment, checkpoint.parameters["crop_size"]
    first = (size - options.crop_size) // 2
    window = f"{first}:{first + options.crop_size}"
    change = f"(x - {options.mean:g}) / {options.std:g}"
    if options.subtract_mean_frame:
        change = f"{options.mean_frame_gain:g} * (x - x.mean(0)) / {options.std:g}"
    return [f"x = crop[:, {window}, {window}].astype('float32') / 255", f"x = {change}", "video = x[None, None]"]


def from_lrw(checkpoint: Checkpoint, run: Path) -> bool:
    """Whether a run's weights come from LRW (`is_of_lrw`), as far as the files beside them name their data set, too."""
    return is_of_lrw(checkpoint, [_summary(checkpoint, run)[0], *_names(evaluations(run, checkpoint.step))])


def evaluations(run: Path, step: int) -> list[dict]:
    """What `lipprep evaluate` has written beside a checkpoint of this step, as far as it can be read."""
    found = []
    for path in sorted(run.glob("evaluate-*/results.json")):
        try:
            results = json.loads(read_text(path, "evaluation", limit=_MAX_RESULTS))
            if results["step"] == step:
                _row(results | results.get("without_boundary", {}))
                _calibration_error(results)
                found.append(results)
        except (ValueError, KeyError, TypeError):  # of an ensemble, or no such file
            continue
    return found


def model_card(checkpoint: Checkpoint, *, path: Path, format: str, file: Path) -> str:
    """The card, in Markdown, of what was exported from the checkpoint `path` to `file`."""
    config, labels = config_from(checkpoint.config), checkpoint.labels
    with torch.device("meta"):  # shapes alone
        network = new_model(config.model, num_classes=len(labels))
    results = evaluations(path.parent, checkpoint.step)
    parameters = sum(weight.numel() for weight in network.parameters())
    words = ", ".join(f"{markdown(label)}" for label in labels[:_SHOWN])
    parts = [
        f"# {markdown(file.name)}",
        f"A lip reader of {len(labels)} words, from silent video of a mouth. Written by lipprep "
        f"{metadata.version('lipprep')} from {markdown(path.name)}, {_origin(checkpoint, config)}.",
        "## What it reads and answers",
        *_signature(checkpoint, network, format),
        _use(checkpoint, format, file, network),
        "## Words",
        f"{len(labels)}: {words}{', ...' if len(labels) > _SHOWN else ''}",
        "## Trained on",
        _list(_data(checkpoint, path.parent, results)),
        "## How",
        _list(_how(config, parameters)),
        "## Accuracy",
        *_accuracy(checkpoint, results, best=path.name == BEST),
        "## Confidence",
        *_confidence(checkpoint, results),
        "## Not for",
        f"It answers one of its {len(labels)} words whatever it sees, also where nobody speaks or another word is "
        "said. It is no transcriber of sentences, no judge of who speaks or how, and nothing to read people by who "
        "have not agreed to it. On other cameras, angles, languages and speakers than its training videos have, it is "
        "worse than on videos like those, by how much is for you to measure.",
        "## Licence",
        "Licence of these weights: **fill in**.",
    ]
    if from_lrw(checkpoint, path.parent):
        parts.append(
            "By their words, their data set's name or the weights that they learnt from, these weights are of LRW, and "
            "fall under the agreement with the BBC by which its videos are given: for research only, and not to be "
            "passed on."
        )
    else:
        parts.append("The licence of the training videos decides what may be done with weights trained on them.")
    return "\n\n".join(parts) + "\n"


def _origin(checkpoint: Checkpoint, config: Config) -> str:
    if imported := config.resolved.get("imported"):
        family = markdown(config.resolved.get("family", "other"))
        return f"imported from {markdown(imported)}, a checkpoint of {family}'s code"
    average = "" if checkpoint.ema is None else ", the moving average of its weights"
    return f"step {checkpoint.step} of its training{average}"


def _signature(checkpoint: Checkpoint, network: LipReader, format: str) -> list[str]:
    size = checkpoint.parameters["crop_size"]
    cut = [
        f"`crop`, (T, {size}, {size}) uint8, is cut as those of its training ({_crops(checkpoint)}); from it to the "
        "network's input:",
        "\n".join(("```python", *normalising(checkpoint), "```")),
    ]
    if format == "mpc001":
        return cut
    side = config_from(checkpoint.config).augment.crop_size
    answer = "a score a word, of which softmax makes probabilities"
    if network.normalised:
        answer = "the mean over the frames of each word's log posterior"
    rows = [
        ("input `video`", f"(B, 1, T, {side}, {side}) float32", "gray mouths, normalised, 0 after each clip's end"),
        ("input `lengths`", "(B,) int64", "each clip's frames, 1 to T"),
    ]
    if network.boundary is not None:
        rows.append(("input `boundary`", "(B, T, 1) float32", "1 in the frames of the word, all 0 where not known"))
    rows.append(("output `logits`", f"(B, {len(checkpoint.labels)}) float32", answer))
    parts = [
        _table(("", "shape", ""), rows),
        f"Any number of clips B and frames T, at {checkpoint.fps:g} frames a second.",
        *cut,
    ]
    if not network.ignores_padding:
        parts.append("Padding reaches a clip's last frames: put clips of one length together for the figures below.")
    if network.boundary is not None:
        parts.append(f"Frames of the word: {BOUNDARIES[network.boundary].format(fps=checkpoint.fps)}.")
    return parts


def _crops(checkpoint: Checkpoint) -> str:
    parameters = checkpoint.parameters
    told = [f"profile {markdown(parameters['profile'])}", f"crop size {parameters['crop_size']}"]
    if parameters.get("box"):
        told.append(f"box {', '.join(map(str, parameters['box']))}")
    elif parameters["profile"] == "fixed":
        told.append("of a box that is not known here")
    if parameters.get("crops_from"):
        told.append("not cut by lipprep")
    if parameters.get("exact"):
        told.append("exact")
    if landmarks := parameters.get("identity") or parameters.get("detector"):
        told.append(f"landmarks of {markdown(landmarks)}")
    if parameters.get("mean_face") is not None:
        told.append("a mean face of its own")
    return ", ".join(told)


def _use(checkpoint: Checkpoint, format: str, file: Path, network: LipReader) -> str:
    """How a file of a format is run."""
    name, known = printable(file.name), network.boundary is not None
    if format == "mpc001":
        beside = configuration_beside(checkpoint, file)
        if beside.suffix == ".yaml":
            return f"For lipreading-snu's code, with the configuration `{printable(beside.name)}`."
        other = "" if file.suffix == ".pth" else f", for which {name} must be called {name}.pth"
        weights = name if file.suffix == ".pth" else f"{name}.pth"
        command = f"main.py --test --config-path {printable(beside.name)} --model-path {weights}"
        return f"In mpc001's code: `{command}`{other}."
    arrays = '{"video": video, "lengths": numpy.array([len(crop)])' + (', "boundary": boundary}' if known else "}")
    answer = f"logits = network(torch.from_numpy(video), torch.tensor([len(crop)]){', boundary' if known else ''})"
    lines = {
        "onnx": (
            "import numpy, onnxruntime",
            "",
            f'session = onnxruntime.InferenceSession("{name}")',
            f'logits = session.run(["logits"], {arrays})[0]',
        ),
        "torch": (
            "import torch",
            "",
            f'with open("{name}", "rb") as file:',
            "    network = torch.export.load(file).module()",
            answer,
        ),
        "safetensors": (
            "import json, pathlib, torch",
            "from lipprep.train.models import build",
            "from safetensors.torch import load_file",
            "",
            f'config = json.loads(pathlib.Path("{name}.json").read_text())',
            'network = build(config["model"], len(config["labels"])).eval()',
            f'network.load_state_dict(load_file("{name}"))',
            answer,
        ),
    }
    code = "\n".join(("```python", *lines[format], "```"))
    if format == "torch":
        move = 'move_to_device_pass(torch.export.load(file), "cuda")'
        code += f"\n\nIt is for the CPU; on a GPU, `{move}.module()`, of torch.export.passes, takes inputs there."
    return code


def _data(checkpoint: Checkpoint, run: Path, results: list[dict]) -> list[tuple[str, str]]:
    name, clips = _summary(checkpoint, run)
    evaluated = ", ".join(_names(results))
    return [
        ("data set", name or (f"{evaluated}, as its evaluation says" if evaluated else "its name is not known here")),
        ("fingerprint", f"{markdown(checkpoint.dataset)}" if checkpoint.dataset else "none"),
        ("clips", clips or "not known here"),
        ("crops", _crops(checkpoint)),
    ]


def _names(results: list[dict]) -> list[str]:
    return sorted({markdown(each["dataset"]) for each in results})


def _summary(checkpoint: Checkpoint, run: Path) -> tuple[str, str]:
    """The data set's name, and the clips of its splits; empty where the run has not ended, or was not here."""
    try:
        summary = json.loads(read_text(run / "summary.json", "summary", limit=_MAX_RESULTS))
        if summary["dataset"] != checkpoint.dataset:
            return "", ""
        clips = ", ".join(f"{int(count):,} {markdown(split)}" for split, count in summary["clips"].items())
        return markdown(summary.get("dataset_name", "")), clips
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", ""


def _how(config: Config, parameters: int) -> list[tuple[str, str]]:
    def plain(options: Mapping) -> str:
        return ", ".join(f"{name} {value}" for name, value in options.items())

    model = {name: value for name, value in complete(config.model).items() if value is not None}
    head, neck = model.pop("head"), model.pop("neck")
    model.pop("init")
    rows = [
        ("recipe", config.recipe),
        ("network", plain(model)),
        ("head", plain(head)),
        *([("neck", plain(neck))] if any(neck.values()) else []),
        ("parameters", f"{parameters:,}"),
    ]
    if not config.resolved.get("imported"):
        names = (
            "epochs",
            "batch_size",
            "optimizer",
            "schedule",
            "lr",
            "weight_decay",
            "label_smoothing",
            "ema",
            "seed",
        )
        rows.append(("settings", plain({name: getattr(config, name) for name in names})))
        options = dataclasses.asdict(config.augment).items()
        augmented = {name: value for name, value in options if value and name not in _READING}
        rows.append(("augmentation", plain(augmented) or "none"))
        learnt = {name: Path(value) for name in ("init_from", "teacher") if (value := getattr(config, name))}
        # Of a checkpoint file, the run that it is in.
        rows += [(name, "/".join(path.parts[-2:] if path.suffix else path.parts[-1:])) for name, path in learnt.items()]
    return [(name, markdown(text)) for name, text in rows]


def _accuracy(checkpoint: Checkpoint, results: list[dict], *, best: bool) -> list[str]:
    parts = []
    if results:
        rows = [_row(each) for each in results]
        for each in results:
            if "without_boundary" in each:
                untold = each | each["without_boundary"]
                rows.append(_row(untold, " without word boundaries, as in the wild"))
        parts.append(_table(("data set, split", "clips", "top-1 (95 % interval)", "top-5"), rows))
        if known := [each for each in results if "boundaries_known" in each]:
            counts = ", ".join(f"{each['boundaries_known']} of {each['clips']} in {each['split']}" for each in known)
            parts.append(f"Word boundaries were told where they are known: {markdown(counts)}.")
    else:
        parts.append("Not evaluated: `lipprep evaluate` measures it, and the next export tells what it found.")
    if checkpoint.best is not None:
        of = "It chose the weights and so flatters" if best else "It need not be that of these weights"
        parts.append(f"Best validation accuracy up to here: {100 * checkpoint.best:.1f} %. {of}.")
    return parts


def _confidence(checkpoint: Checkpoint, results: list[dict]) -> list[str]:
    if (calibration := checkpoint.calibration) is None:
        return [
            "Not calibrated: how sure it is says little of how often it is right. `lipprep evaluate RUN --shards DIR "
            "--split val --calibrate` fits a temperature."
        ]
    untold = ", told no word boundaries" if config_from(checkpoint.config).model.get("boundary") else ""
    measured = [each for each in results if each.get("temperature") == calibration.temperature]
    return [
        f"Divide the logits by the temperature {calibration.temperature:.4g} before the softmax: then it is about as "
        f"sure as it is right, on clips like those that this was fitted on{untold}. Below a confidence of "
        f"{calibration.threshold:g}, its threshold, let it abstain. Of words that it does not know nothing was fitted.",
        *filter(None, map(_calibration_error, measured)),
    ]


def _calibration_error(results: Mapping) -> str:
    """What an evaluation found of confidence, if anything. Raises what `_row` does where `results` are none."""
    found = results.get("without_boundary", results)
    if "ece_calibrated" not in found:
        return ""
    ece, calibrated, kept = (f"{100 * found[name]:.1f} %" for name in ("ece", "ece_calibrated", "kept"))
    right = f", of which {100 * found['kept_top1']:.1f} % are right" if "kept_top1" in found else ""
    return (
        f"{markdown(results['dataset'])}, {markdown(results['split'])}: calibration error (ECE) {ece}, with the "
        f"temperature {calibrated}; by the threshold it answers {kept} of the clips{right}."
    )


def _row(results: Mapping, more: str = "") -> tuple[str, ...]:
    """A row of the table of accuracies. Raises KeyError, TypeError or ValueError where `results` are none."""
    low, high = results["top1_interval95"]
    top1 = f"{100 * results['top1']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    split = markdown(f"{results['dataset']}, {results['split']}")
    return f"{split}{more}", f"{int(results['clips']):,}", top1, f"{100 * results['top5']:.1f} %"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def _list(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"* {name}: {text}" for name, text in rows)
