"""The command line. Heavy imports happen inside the commands, so that ``fewbits --help`` answers at once."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.errors import FewbitsError

app = typer.Typer(
    name="fewbits",
    help="Neural networks on few bits: allocate, quantize, train, pack, verify, run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Mode(str, Enum):
    """Export modes."""

    fastest = "fastest"
    smallest = "smallest"


Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON; all else goes to stderr.")]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder.  [default: runs/RECIPE]")]
To = Annotated[Path | None, typer.Option("--to", help="File to write in place of that of the run.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the run that is in the folder.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change the recipe: qat.epochs=3. May be repeated.")]
SmokeRun = Annotated[bool, typer.Option("--smoke", help="A few steps on a few examples, to see that all works.")]
Run = Annotated[Path, typer.Argument(help="Folder of a run.")]
Target = Annotated[Path, typer.Argument(help="Folder of a run, or a packed file in one.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of ONNX Runtime and PyTorch.")]
Model = Annotated[
    str, typer.Argument(help="E.g. resnet20, gpt2, torchvision:NAME, timm:NAME, transformers:NAME, yolo-world:l.")
]
Input = Annotated[str | None, typer.Option("--input", help="Shape of an image, C,H,W, or tokens.  [default: by model]")]
Classes = Annotated[int | None, typer.Option(min=2, help="Classes, or tokens of the vocabulary.  [default: by model]")]
ActBits = Annotated[int | None, typer.Option(help="Bits of activations.  [default: float]")]
FirstLast = Annotated[int, typer.Option(help="Least bits of the first and the last layer.")]


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
) -> None:
    """Options of every command; ``main`` looks for --debug itself."""


@app.command()
def demo(out: Out = None, smoke: SmokeRun = False, as_json: Json = False) -> None:
    """Run recipe 'digits': a 2-bit model in a minute.

    It replaces what an earlier demo left in the folder.
    """
    from fewbits.recipes.folder import RunFolder

    before = RunFolder(out or Path("runs/digits"))
    again = before.holds_run and before.recipe().name == "digits"
    _run("digits", out, None, smoke, force=again, as_json=as_json)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or the path of one.")],
    out: Out = None,
    changes: Set = None,
    smoke: SmokeRun = False,
    force: Force = False,
    guard: Annotated[
        float | None, typer.Option("--guard-worst-group", min=0, help="Points that any group may lose against float.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a recipe end to end.

    The steps: float model, plan, calibrate, train, pack, export, verify, report.
    """
    guarded = [] if guard is None else [f"evaluate.guard_worst_group={guard}"]
    _run(recipe, out, [*(changes or ()), *guarded], smoke, force, as_json)


@app.command()
def resume(folder: Run, as_json: Json = False) -> None:
    """Go on with a run that was stopped.

    It ends as if it had not been stopped.
    """
    with _answer(as_json) as answer, _resumable(folder):
        from fewbits.recipes.folder import RunFolder
        from fewbits.recipes.runner import finish

        _show_run(answer, folder, finish(RunFolder.open(folder), _say))


@app.command()
def allocate(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="Plan to write.")] = Path("plan.json"),
    size_mb: Annotated[float | None, typer.Option(help="Budget: millions of bytes of the packed tensors.")] = None,
    average_bits: Annotated[float | None, typer.Option(help="Budget: mean bits of a weight.")] = None,
    bops: Annotated[float | None, typer.Option(help="Budget: bit operations of one input.")] = None,
    energy_uj: Annotated[float | None, typer.Option(help="Budget: microjoules of one input on --hardware.")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Budget: milliseconds of one input on --hardware.")] = None,
    hardware: Annotated[str | None, typer.Option(help="int8_mac, shift_add, cpu, npu, or a YAML file.")] = None,
    method: Annotated[str, typer.Option(help="Allocation method: solver, uniform, sigma, ...")] = "solver",
    menu: Annotated[str, typer.Option(help="Weight bits to choose from.")] = "2,3,4,6,8",
    act_bits: ActBits = None,
    first_last: FirstLast = 8,
    weights: Annotated[str | None, typer.Option(help="File with float weights.")] = None,
    input_shape: Input = None,
    classes: Classes = None,
    as_json: Json = False,
) -> None:
    """Write the plan that fits a budget."""
    with _answer(as_json) as answer:
        from fewbits.recipes.models import allocated, cost, named_model

        built, example = named_model(model, classes, _numbers("--input", input_shape), weights)
        limits = {"size_mb": size_mb, "average_bits": average_bits, "bops": bops, "energy_uj": energy_uj,
                  "latency_ms": latency_ms, "hardware": hardware}  # fmt: skip
        bits = _numbers("--menu", menu)
        plan = allocated(built, example, limits, method=method, menu=bits, act_bits=act_bits, first_last=first_last)
        plan.save(out)
        found = cost(built, example, plan, hardware)
        if hardware is not None:
            found["hardware"]["weights"] = weights or "random"
        answer.update(found, plan=str(out), decided_from=dict(plan.decided_from))
        answer.shown = lambda: _show_cost(answer.data, f"{model}: {out}")


@app.command()
def cost(
    model: Model,
    weight_bits: Annotated[int, typer.Option(help="Bits of weights.")] = 8,
    act_bits: ActBits = None,
    first_last: FirstLast = 8,
    plan: Annotated[Path | None, typer.Option(help="A plan.json, in place of uniform bits.")] = None,
    policy: Annotated[str | None, typer.Option(help="Of yolo-world:SIZE: bits W-A-Att, such as 4-4-8.")] = None,
    vocabulary: Annotated[int | None, typer.Option(min=1, help="Of yolo-world:SIZE: texts.  [default: 80]")] = None,
    hardware: Annotated[
        str | None,
        typer.Option(help="int8_mac, shift_add, cpu, npu, or a YAML file.  [default: shift_add; none of yolo-world]"),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="File with float weights.  [default: random]")] = None,
    input_shape: Input = None,
    classes: Classes = None,
    as_json: Json = False,
) -> None:
    """Print bytes, bit operations, cycles and energy of a plan.

    Cycles of the shift-add MAC are those of the weights at hand: of random ones without --weights.
    """
    with _answer(as_json) as answer:
        from fewbits.recipes.models import cost as cost_of
        from fewbits.recipes.models import is_open_detector, plan_for, weighed_model

        is_open = is_open_detector(model)
        if vocabulary is not None and not is_open:
            raise typer.BadParameter(f"--vocabulary is for yolo-world:SIZE, got {model!r}; see --classes")
        if vocabulary is not None and classes is not None:
            raise typer.BadParameter(f"--vocabulary {vocabulary} and --classes {classes} mean the same: drop one")
        hardware = hardware if hardware or is_open else "shift_add"
        count = classes if vocabulary is None else vocabulary
        built, example = weighed_model(model, count, _numbers("--input", input_shape), weights, hardware)
        chosen = plan_for(built, plan, weight_bits, act_bits, first_last, policy)
        found = cost_of(built, example, chosen, hardware)
        if hardware:
            found["hardware"]["weights"] = weights or "random"
        answer.update({"model": model, "input": list(example.shape[1:])}, **found)
        answer.shown = lambda: _show_cost(answer.data, model)


@app.command()
def pack(folder: Run, to: To = None, as_json: Json = False) -> None:
    """Pack the trained model of a run again."""
    with _answer(as_json) as answer:
        from fewbits.recipes.revisit import repack

        answer.update(repack(folder, to))


@app.command()
def export(
    target: Target,
    mode: Annotated[Mode | None, typer.Option(help="What the file is for.  [default: by recipe]")] = None,
    to: To = None,
    as_json: Json = False,
) -> None:
    """Export the packed model of a run to ONNX."""
    with _answer(as_json) as answer:
        from fewbits.recipes.revisit import reexport

        answer.update(reexport(target, None if mode is None else mode.value, to))


@app.command()
def verify(
    target: Target,
    onnx: Annotated[Path | None, typer.Option(help="ONNX file.  [default: model.onnx of the run]")] = None,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Hold the ONNX file against the packed model.

    Both run on the test examples; the time of the float model is taken in turn.
    """
    with _answer(as_json) as answer:
        from fewbits.recipes.revisit import reverify

        answer.update(reverify(target, onnx, threads))


@app.command()
def bench(
    target: Annotated[Path, typer.Argument(help="Folder of a run, or an ONNX file.")],
    batch: Annotated[int, typer.Option(min=1, help="Inputs a call.")] = 1,
    threads: Threads = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls; the median is told.")] = 50,
    prompt: Annotated[str | None, typer.Option("--generate", help="Let a language model go on with this text.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to write.  [default: 64, or what fits]")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Of the choice of tokens; 0 takes the likeliest.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Time the quantized model against float."""
    with _answer(as_json) as answer:
        if prompt is not None:
            from fewbits.recipes.writing import write_text

            answer.update(write_text(target, prompt, tokens, threads, temperature))
            return
        from fewbits.recipes.revisit import bench as time_it

        answer.update(time_it(target, batch, threads, rounds))


@app.command()
def detect(
    target: Target,
    image: Annotated[Path, typer.Argument(help="Picture to look at.")],
    text: Annotated[str, typer.Option("--text", help='What to look for: "a red square, a striped circle".')],
    out: Annotated[Path, typer.Option("--out", help="Picture to write, with boxes.")] = Path("detected.png"),
    score: Annotated[float, typer.Option(min=0, max=1, help="Least score of what is told.")] = 0.25,
    encoder: Annotated[
        str | None, typer.Option(help="Folder of the CLIP that encodes texts.  [default: that of training]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find what words name on a picture, with a packed open-vocabulary detector."""
    with _answer(as_json) as answer:
        from fewbits.recipes.detecting import detect as find

        answer.update(find(target, image, text, out, score, encoder))
        answer.shown = lambda: _show_found(answer.data)


@app.command()
def report(
    folder: Run,
    beside: Annotated[
        list[Path] | None, typer.Option("--beside", help="Another run, whose groups are shown beside this one's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write report.html of a run folder anew."""
    with _answer(as_json) as answer:
        from fewbits.report import write_report

        answer.update({"file": str(write_report(folder, beside or ()))})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Errors of fewbits end it with one message and exit code 1, wrong usage with 2."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        app(given)
    except FewbitsError as error:
        if "--debug" in given:
            raise
        sys.exit(f"error: {error}")


class _Answer:
    """What a command answers: data for --json, and how a person is shown it."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.shown = self._lines

    def update(self, data: dict[str, Any], **more: Any) -> None:
        self.data |= data | more

    def _lines(self) -> None:
        for name, value in self.data.items():
            typer.echo(f"{name.replace('_', ' '):<18} {_text(value)}")


@contextlib.contextmanager
def _answer(as_json: bool) -> Iterator[_Answer]:
    """Collect an answer and print it; with --json nothing else reaches stdout."""
    answer = _Answer()
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield answer
    if as_json:
        typer.echo(json.dumps(answer.data, allow_nan=False, default=str))
    else:
        answer.shown()


def _run(recipe: str, out: Path | None, changes: list[str] | None, smoke: bool, force: bool, as_json: bool) -> None:
    with _answer(as_json) as answer:
        from fewbits.recipes.read import find, read
        from fewbits.recipes.runner import run as run_recipe

        chosen = read(find(recipe), changes or ())
        folder = out or Path("runs") / chosen.name
        with _resumable(folder):
            result = run_recipe(chosen.smoked() if smoke else chosen, folder, replace=force, say=_say)
        _show_run(answer, folder, result)


@contextlib.contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Tell who presses Ctrl-C how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"stopped; go on with: fewbits resume {folder}", err=True)
        raise typer.Exit(130) from None


def _show_run(answer: _Answer, folder: Path, result: dict[str, Any]) -> None:
    from rich.console import Console

    from fewbits.recipes.results import summary

    def show() -> None:
        Console().print(summary(result))
        for note in (*result["notes"], *(result["onnx"] or {}).get("notes", ())):
            typer.echo(f"note: {note}")
        typer.echo(f"{result['seconds']['total']:.0f} s; open {folder / 'report.html'}")

    answer.update(result, folder=str(folder))
    answer.shown = show


def _show_cost(data: dict[str, Any], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "type", title=title, title_justify="left", box=None, pad_edge=False)
    hardware = data.get("hardware")
    for column in ("weights", "bits", "bytes", "MACs", "BOPs", *(("cycles", "uJ") if hardware else ())):
        table.add_column(column, justify="right")
    for row in data["layers"]:
        numbers = [f"{row[k]:,}" for k in ("weights", "bits", "bytes", "macs", "bops")]
        if hardware:
            numbers += [_cycles(row), f"{sum(row['energy_uj'].values()):,.3g}"]
        table.add_row(row["name"], row["kind"], *numbers)
    console = Console()
    console.print(table)
    console.print(
        f"{data['weights']:,} weights, {data['average_weight_bits']:.2f} bits on average; {data['bytes']:,} bytes "
        f"(float {data['float_bytes']:,}, {data['float_bytes'] / data['bytes']:.1f}x); {data['bops']:,} bit operations",
        highlight=False,
    )
    if "detector" in data:
        console.print(_detector_line(data["detector"], data["texts"]), highlight=False)
    if hardware:
        console.print(_hardware_line(data, hardware), highlight=False)


def _show_found(data: dict[str, Any]) -> None:
    for row in data["found"]:
        typer.echo(f"{row['score']:.2f}  {row['prompt']:<30} {' '.join(f'{c:.0f}' for c in row['box'])}")
    typer.echo(f"{len(data['found'])} found, drawn into {data['picture']}")


def _detector_line(found: dict[str, Any], texts: int) -> str:
    return (
        f"with {texts:,} texts, as published work counts: {found['mib']:.2f} MiB (float {found['float_mib']:.2f}), "
        f"{found['tbops']:.2f}e12 bit operations (float {found['float_tbops']:.2f}e12)"
    )


def _cycles(row: dict[str, Any]) -> str:
    return "-" if row["cycles"] is None else f"{row['cycles']:,.0f}"


def _hardware_line(data: dict[str, Any], hardware: dict[str, Any]) -> str:
    measured = hardware["cycles_from"] == "the weights at hand"
    whose = f", measured on {hardware['weights']} weights" if measured else ""
    if hardware["float_inputs_fed_as_8_bits"]:
        whose += ", float inputs fed as 8 bits"
    energy = data["energy_uj"]
    return (
        f"{hardware['name']}: {_cycles(data)} cycles{whose}; {energy['compute']:,.4g} uJ to compute "
        f"({hardware['energy_ratio']:.3f} of INT8), {energy['memory']:,.4g} uJ to read weights and inputs; "
        f"{data['latency_ms']:,.4g} ms (computing takes {hardware['latency_ratio']:.2f} times INT8)"
    )


def _say(text: str) -> None:
    typer.echo(text, file=sys.stdout)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _numbers(option: str, text: str | None) -> list[int] | None:
    """Read ``3,224,224`` or ``3x224x224``."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option} takes whole numbers with commas, got {text!r}") from None


if __name__ == "__main__":
    main()
