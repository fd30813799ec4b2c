"""The command line: parse, call one function, print. Heavy imports happen inside the commands, so that --help is quick.

Exit codes: 0 done; 1 a promise failed; 2 the user's input is wrong. Expected errors are one sentence without traceback.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcdeploy.errors import McdeployError, MissingExtraError

if TYPE_CHECKING:
    from mcdeploy.recipe import Recipe

app = typer.Typer(
    help="Learn which connections of a vision backbone matter, remove the rest, prove it, ship it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the recipe; may be repeated.")
]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, or the name of one that ships.")],
    out: Annotated[Path | None, typer.Option(help="The run folder; default: runs/<name of the recipe>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in the run folder.")] = False,
    overrides: SetOption = [],  # noqa: B006  typer copies it
) -> None:
    """Train a recipe; leaves a checkpoint, metrics.jsonl and TensorBoard files in the run folder."""
    from mcdeploy.recipe import load_recipe

    loaded = load_recipe(_find_recipe(recipe), tuple(overrides))
    run = out or Path("runs") / loaded.name
    result = _train(loaded, run, resume)
    print(f"top-1 {result:.2%} on the validation images; the run is in {run}")


def _train(recipe: Recipe, run: Path, resume: bool) -> float:
    """Data, model and loop of one recipe; returns the top-1 accuracy, 0..1."""
    with _extra("mcdeploy train", "train"):
        import torch

        from mcdeploy.data import build_loaders
        from mcdeploy.model import build_model
        from mcdeploy.train import train as run_training
    from mcdeploy.recipe import MaskConnectConfig

    torch.manual_seed(recipe.seed)
    loaders = build_loaders(recipe.data, recipe.train.batch_size, recipe.train.eval_batch_size, recipe.seed)
    model = build_model(recipe.model, recipe.connectivity, len(loaders.classes), recipe.data.image_size)
    gates = recipe.connectivity if isinstance(recipe.connectivity, MaskConnectConfig) else None
    result = run_training(
        model,
        loaders,
        recipe.train,
        recipe.data,
        seed=recipe.seed,
        out=run,
        gate_config=gates,
        header={"recipe": recipe.model_dump(mode="json")},
        resume=resume,
    )
    return result.accuracy.top1


def _find_recipe(given: Path) -> Path:
    """A path as it is, or the shipped recipe of that name."""
    if given.suffix in (".yaml", ".yml") or given.exists():
        return given
    for folder in (Path(__file__).parent / "recipes", Path(__file__).parents[1] / "recipes"):
        if (folder / f"{given}.yaml").exists():
            return folder / f"{given}.yaml"
    return given


class _extra:
    """Turns a missing package into the sentence that names the extra to install."""

    def __init__(self, command: str, extra: str) -> None:
        self.command, self.extra = command, extra

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith(("mcdeploy", "mcruntime")):
            raise MissingExtraError(self.command, str(error.name), self.extra) from None


def main() -> None:
    """Run a command; an expected error is printed alone and becomes the exit code."""
    try:
        app()
    except McdeployError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
