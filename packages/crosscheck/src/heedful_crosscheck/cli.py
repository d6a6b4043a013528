"""`heedful …` on the command line."""

import json
import shlex
import signal
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from heedful_crosscheck import Report

AGREE, DISAGREE, COULD_NOT_RUN = 0, 1, 2

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


Backends = Annotated[
    list[str] | None, typer.Option(help="A backend's name; repeat for more. All by default.")
]
Cases = Annotated[
    list[str] | None,
    typer.Option(
        "--cases",
        "--case",
        help="A case or a group, * and ? allowed; repeat for more. All by default.",
    ),
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option(help="float64, float32, float16 or bfloat16; by default each case's own."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of generated inputs and cotangents.")]
Strict = Annotated[bool, typer.Option("--strict", help="Count lossy as disagreement (status 1).")]
Imports = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Imported first: one that registers."),
]

Html = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="PATH",
        help="Where the report goes as one HTML file; of heedful-crosscheck[report].",
    ),
]
Markdown = Annotated[
    Path | None,
    typer.Option("--markdown", metavar="PATH", help="The same, for a comment on a pull request."),
]
JUnit = Annotated[
    Path | None, typer.Option("--junit", metavar="PATH", help="The same, as CI systems read tests.")
]


@app.callback()
def _heedful() -> None:
    """One attention call, any array, any backend, and proof that they agree."""


def _of_function(*names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel="What the function calls things", **more)


@app.command()
def crosscheck(
    function: Annotated[
        str | None,
        typer.Argument(
            metavar="[PACKAGE.MODULE:FUNCTION]",
            help="An attention function, or a heedful_crosscheck.Function, which is judged in place "
            "of the backends.",
        ),
    ] = None,
    backend: Backends = None,
    cases: Cases = None,
    dtype: Dtypes = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE.safetensors",
            help="Your own <case>.q, .k, .v, options and cotangents, of heedful_crosscheck.save, in "
            "place of the cases here; beside them where --cases is given too.",
        ),
    ] = None,
    json_path: Annotated[
        Path, typer.Option("--json", metavar="PATH", help="Where the report goes as JSON.")
    ] = Path("crosscheck.json"),
    html: Html = None,
    markdown: Markdown = None,
    junit: JUnit = None,
    seed: Seed = 0,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Fewer cases: every value of every factor and most pairs, in 2 minutes."
        ),
    ] = False,
    strict: Strict = False,
    imports: Imports = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Every case in every dtype, with three seeds, as long as that takes."
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was stopped, the same command.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="How many backends compute at once: cores, up to 4.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="The most that one answer may take.")
    ] = 300.0,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.1, metavar="GIB", help="The most that a backend may hold: by default half."
        ),
    ] = None,
    in_process: Annotated[
        bool,
        typer.Option("--in-process", help="Ask in this process, without limits: for a debugger."),
    ] = False,
    shrink: Annotated[
        bool,
        typer.Option(
            "--shrink",
            help="Of whoever disagrees, the smallest case that shows it, as a script without heedful.",
        ),
    ] = False,
    layout: Annotated[
        str | None, _of_function(help="Of q, k, v and out: bhsd, the default, or bshd.")
    ] = None,
    takes: Annotated[
        str | None,
        _of_function(
            metavar="NAME[=ARGUMENT],…",
            help="What it takes beyond q, k and v, and by which arguments: causal,scale=sm_scale,gqa.",
        ),
    ] = None,
    causal: Annotated[
        str | None,
        _of_function(help="Where its queries stand: bottom_right, top_left or square."),
    ] = None,
    always_causal: Annotated[
        bool, _of_function("--always-causal", help="It is causal without being asked.")
    ] = False,
    mask: Annotated[
        str | None,
        _of_function(
            help="What it is: visible, the default, hidden, additive, visible_keys or hidden_keys."
        ),
    ] = None,
    window: Annotated[
        str | None, _of_function(help="What it is: pair, the default, pair_minus_one or last.")
    ] = None,
    lse: Annotated[
        str | None, _of_function(help="It returns out and a log-sum-exp: natural or base2.")
    ] = None,
    lse_layout: Annotated[
        str | None, _of_function(help="Of the log-sum-exp: bhs, the default, or bsh.")
    ] = None,
    declines: Annotated[
        str | None, _of_function(metavar="NAME,…", help="Promises that it does not make.")
    ] = None,
    head_dims: Annotated[
        str | None, _of_function(metavar="D,…", help="The only head sizes that it has.")
    ] = None,
    multiple_of: Annotated[
        int | None, _of_function(min=1, help="What its lengths must be multiples of.")
    ] = None,
    framework: Annotated[
        str | None, _of_function(help="jax, torch or numpy, where that cannot be found out.")
    ] = None,
    name: Annotated[str | None, _of_function(help="What the report calls it.")] = None,
) -> None:
    """Run every backend against a float64 oracle: outputs, log-sum-exp and gradients.

    Or one attention function of yours, `package.module:function`, and what it calls things.

    Each backend is asked in a process of its own: one that aborts, hangs or fills the memory takes
    nothing with it, and has crashed.

    Exit status: 0 all agree (lossy, which is said, included unless --strict), 1 somebody disagrees or
    crashes, 2 it could not run; 130 or 143 where Ctrl-C or SIGTERM ended it, and the report is what was
    known.
    """
    import heedful_crosscheck as judge  # here, since JAX takes seconds to import
    from heedful_crosscheck import isolation, journal, process, script
    from heedful_crosscheck.in_process import InProcess
    from heedful_crosscheck.inquiries import declined_by, in_full, inquiries_of
    from heedful_crosscheck.origin import Origin
    from heedful_crosscheck.proceedings import proceed
    from heedful_crosscheck.progress import Shown
    from heedful_crosscheck.respondent import Crashed, Respondent

    conventions: dict[str, Any] = {
        "layout": layout,
        "takes": takes and takes.split(","),
        "causal": causal,
        "always_causal": always_causal,
        "mask": mask,
        "window": window,
        "lse": lse,
        "lse_layout": lse_layout,
        "declines": declines and declines.split(","),
        "head_dims": head_dims and _integers("--head-dims", head_dims),
        "multiple_of": multiple_of,
        "framework": framework,
        "name": name,
    }
    conventions = {option: x for option, x in conventions.items() if x}
    if function is None and conventions:
        said = ", ".join(f"--{option.replace('_', '-')}" for option in conventions)
        _stop(f"{said} describes a function, and none is named. Name it: package.module:function.")
    files = _files(json=json_path, html=html, markdown=markdown, junit=junit)
    if input_file and json_path.exists() and input_file.exists() and json_path.samefile(input_file):
        _stop(f"--json {json_path} is the file of --input. Write the report to another one.")
    if quick and (cases or input_file or full):
        _stop("--quick is a selection of cases of its own. Leave --cases, --input and --full out.")
    if shrink and find_spec("hypothesis") is None:
        _stop("--shrink needs Hypothesis: pip install heedful-crosscheck[shrink].")
    target = files["json"]
    is_file = target.is_file() or not target.exists()
    kept = target.with_name(f"{target.name}.journal") if is_file else None
    ended, scripts = None, list[str]()
    jobs = jobs or judge.run.WORKERS
    limits = process.Limits(timeout, *([] if memory is None else [int(memory * process.GIB)]))
    origin = Origin(tuple(imports or ()), function, conventions)
    signal.signal(signal.SIGTERM, _end)
    try:
        if dtype is not None:
            judge.check_dtypes(dtype)
        loaded = judge.load(input_file) if input_file else ()
        selected: list[judge.Case | str] = [
            *(cases or []),
            *loaded,
            *(judge.quick() if quick else ()),
        ]
        chosen = judge.chosen_cases(selected or None)
        if quick:
            typer.echo(f"--quick: {judge.share_of_pairs(judge.quick())}.", err=True)
        with InProcess(origin) if in_process else isolation.Workers(origin, limits) as judged:
            asked = inquiries_of(judged, backend, chosen, dtype, seed, jobs)
            if full:
                asked = list(map(in_full, asked))
            names = [name for inquiry in asked for name in inquiry.respondents]
            for needed in judged.memory(loaded, names, dtype or judge.run.DTYPES[:3], jobs):
                typer.echo(f"memory: {needed}", err=True)
            with journal.kept(kept, resume, asked) as (before, add), Shown() as shown:
                report = proceed(
                    asked,
                    strict=strict,
                    declined=declined_by(judged),
                    jobs=jobs,
                    progress=shown.progress,
                    known=[add, shown.known],
                    before=before,
                    environment=lambda: judged.environment,
                )
            if shrink and report.failures:
                described = origin.load() if function else None

                def again(name: str) -> Respondent:
                    return judged.respondents([name], 1)[name][0]

                scripts = list(script.scripts(report, asked, again, described, origin.imports))
    # A name, a file, a description; what a backend raises is judged instead.
    except (TypeError, ValueError) as error:
        _stop(str(error))
    except Crashed as crash:
        _stop(f"what is judged cannot be asked at all: crashed: {crash}")
    except judge.Interrupted as interrupted:
        report, ended = interrupted.report, interrupted.__cause__
    report = replace(report, command=_command())
    # First the files: what a backend did to this process may keep the table from being printed.
    _write_as(report, files)
    _print(report)
    typer.echo(f"The same as JSON: {json_path}")
    for text in scripts:
        typer.echo(f"\n{text}")
    if ended is not None:
        typer.echo(
            "heedful: ended before its time; the report is what was known by then"
            + (", and the same command with --resume goes on." if kept else "."),
            err=True,
        )
        raise typer.Exit(
            128 + (signal.SIGTERM if isinstance(ended, _Terminated) else signal.SIGINT)
        )
    raise typer.Exit(_exit_status(report, backend or list(report.declined)))


@app.command()
def record(
    file: Annotated[Path, typer.Argument(metavar="FILE.safetensors", help="Where they go.")],
    backend: Annotated[str, typer.Option(help="Whose answers.")],
    cases: Cases = None,
    dtype: Dtypes = None,
    seed: Seed = 0,
    imports: Imports = None,
) -> None:
    """Keep what a backend answers on this machine: outputs, log-sum-exp and gradients.

    Exit status: 0 it is written, 2 it could not be.
    """
    import heedful_crosscheck as judge
    from heedful_crosscheck import records

    _import(imports or [])
    try:
        chosen = judge.chosen_cases(cases)
        (name,) = judge.chosen_backends([backend])
        found = records.record(name, chosen, dtype, seed, judge.report.environment())
    except ValueError as error:
        _stop(str(error))
    records.save(found, file)
    by = f", by {found.kernel}" if found.kernel else ""
    typer.echo(
        f"{len(found.runs)} answers of {name}{by}, in {file}, {file.stat().st_size:,} bytes."
    )


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE.safetensors", help="Of `heedful record`.")],
    backend: Backends = None,
    strict: Strict = False,
    imports: Imports = None,
) -> None:
    """Judge a record by the oracle, and the backends here by the record.

    Exit status: as of `crosscheck`.
    """
    import heedful_crosscheck as judge
    from heedful_crosscheck import records

    _import(imports or [])
    started = time.perf_counter()
    try:
        found = records.load(file)
        outcomes = records.replay(found, judge.chosen_backends(backend))
    except ValueError as error:
        _stop(str(error))
    seconds = time.perf_counter() - started
    report = judge.Report(tuple(outcomes), found.seed, seconds, strict)
    when, by = found.environment.get("date", "undated"), found.kernel or found.backend
    typer.echo(f"{file}: {by}, {when}, judged by the oracle; the others by its answers.")
    _print(report)
    raise typer.Exit(_exit_status(report, backend or []))


@app.command("cases")
def list_cases(
    pattern: Annotated[
        list[str] | None,
        typer.Argument(help="A case or a group, * and ? allowed. All by default."),
    ] = None,
) -> None:
    """Every case that a crosscheck asks, what it is, and why it is there."""
    import heedful_crosscheck as judge
    from heedful_crosscheck.listing import listing

    try:
        found = judge.chosen_cases(pattern)
    except ValueError as error:
        _stop(str(error))
    _print(listing(found))


@app.command()
def backends(
    shape: Annotated[
        str | None,
        typer.Option(metavar="B,Hq,Sq,D", help="Of one call's q: who takes it, and who is chosen?"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of that call.")] = "float32",
    causal: Annotated[bool, typer.Option("--causal", help="The same as --with causal.")] = False,
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="NAME[=VALUE]",
            help="What else it asks: window=256,0 or mask=qk or softcap or return_lse; repeat for more.",
        ),
    ] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Hkv, where it is not Hq.")] = None,
    kv_length: Annotated[int | None, typer.Option(min=0, help="Sk, where it is not Sq.")] = None,
    value_dim: Annotated[int | None, typer.Option(min=1, help="Dv, where it is not D.")] = None,
    caller: Annotated[
        str, typer.Option("--from", help="Whose arrays call: jax, numpy or torch.")
    ] = "jax",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    imports: Imports = None,
) -> None:
    """What each backend can do here, and why each other cannot; or who takes one call, and who not.

    Computes nothing. Exit status: 0, or 2 where that is no call.
    """
    from heedful_crosscheck import abilities, asking

    _import(imports or [])
    if shape is None:
        found = abilities.here()
        _print(json.dumps(found.as_json(), indent=1) if as_json else found)
        return
    try:
        explanation = abilities.explained(
            caller,
            asking.sizes(shape, kv_heads, kv_length, value_dim),
            dtype,
            asking.asked([*(with_ or []), *(["causal"] if causal else [])]),
        )
    except (TypeError, ValueError) as error:
        _stop(str(error))
    said = abilities.explanation_as_json(explanation)
    typer.echo(json.dumps(said, indent=1) if as_json else explanation)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    imports: Imports = None,
) -> None:
    """What is installed here, what works and what does not: a text for a bug report."""
    from heedful_crosscheck.doctor import examine

    _import(imports or [])
    found = examine()
    typer.echo(json.dumps(found.as_json(), indent=1) if as_json else found)


@app.command()
def report(
    file: Annotated[
        Path, typer.Argument(metavar="CROSSCHECK.json", help="Of `heedful crosscheck --json`.")
    ],
    html: Html = None,
    markdown: Markdown = None,
    junit: JUnit = None,
) -> None:
    """Show a report that was saved, here or in other forms; nothing is run.

    Exit status: 0 it is shown, 2 it could not be read.
    """
    found = _report(file)
    files = _files(html=html, markdown=markdown, junit=junit)
    _write_as(found, files)
    if not files:
        _print(found)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE.json", help="A report.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER.json", help="A later one.")],
) -> None:
    """Say what got better or worse between two reports: of versions of torch, JAX, a driver.

    Worse is another verdict, an error that grew by more than noise, a run that is no longer there.

    Exit status: 0 nothing is worse, 1 something is, 2 a report could not be read.
    """
    from heedful_crosscheck.report.changes import Changes

    changes = Changes(_report(before), _report(after))
    _print(changes)
    raise typer.Exit(DISAGREE if changes.worse else AGREE)


def _command() -> str:
    """What was typed."""
    return shlex.join(["heedful", *sys.argv[1:]])


def _files(**asked: Path | None) -> dict[str, Path]:
    """By form where the report goes; now, since a backend may leave this folder, and a link a link."""
    files = {form: path.resolve() for form, path in asked.items() if path is not None}
    for form, path in files.items():
        _check_writable(path, f"--{form} {asked[form]}")
        if same := [other for other in files if other != form and files[other] == path]:
            _stop(f"--{form} and --{same[0]} name one file, {asked[form]}. Name two.")
    missing = [x for x in ("jinja2", "matplotlib") if "html" in files and find_spec(x) is None]
    if missing:
        _stop(f"--html needs {' and '.join(missing)}: pip install 'heedful-crosscheck[report]'.")
    return files


def _write_as(report: "Report", files: dict[str, Path]) -> None:
    """JSON before the rest, which it can be made of."""
    for form, path in files.items():
        if form == "json":
            _write(path, json.dumps(report.as_json(), indent=1) + "\n")
        else:
            _write(path, getattr(report, f"as_{form}")())


def _report(path: Path) -> "Report":
    import heedful_crosscheck as judge

    try:
        return judge.Report.read(path)
    except ValueError as error:
        _stop(str(error))


class _Terminated(KeyboardInterrupt):
    """SIGTERM came, which is to be like Ctrl-C."""


def _end(*_: object) -> NoReturn:
    raise _Terminated


def _write(path: Path, text: str) -> None:
    """The whole file or none of it; what is no file, as /dev/stdout, as it goes."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _print(found: Any) -> None:
    """Text as it is, anything else as Rich lays it out."""
    if isinstance(found, str):
        typer.echo(found)
        return
    from heedful_crosscheck.report import WIDTH

    Console(width=None if sys.stdout.isatty() else WIDTH).print(found)


def _exit_status(report: "Report", asked_for: list[str]) -> int:
    if report.failures or (report.strict and report.losses):
        return DISAGREE
    ran_nothing = [name for name in asked_for if report.verdicts[name] == "refused"]
    if ran_nothing or not report.agree:
        return COULD_NOT_RUN
    return AGREE


def _import(modules: list[str]) -> None:
    from heedful_crosscheck.origin import Origin, OriginError

    try:
        Origin(tuple(modules)).load()
    except OriginError as error:
        _stop(str(error))


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(x) for x in text.split(",")]
    except ValueError:
        _stop(f"{option} takes whole numbers, separated by commas. Got {text!r}.")


def _check_writable(path: Path, asked: str) -> None:
    """Before the long run, not after it."""
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        _stop(f"{asked} cannot be written: {error}")
    if not existed:
        path.unlink()


def _stop(message: str) -> NoReturn:
    typer.echo(f"heedful: {message}", err=True)
    raise typer.Exit(COULD_NOT_RUN)


def main() -> None:
    """The console script."""
    app()
