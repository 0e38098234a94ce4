"""Distillation by LEAF (arXiv 2509.12539): a student learns to give its teacher's vectors, and nothing else.

`run(recipe)`, or `python -m leafkern.train recipe.yaml`. See `leafkern.train.recipe` for what a recipe may say.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leafkern.train.recipe import Recipe

__all__ = ["Result", "run"]


@dataclasses.dataclass(frozen=True)
class Result:
    """path: the output folder. history: the records of history.jsonl. model: the trained student's folder."""

    path: Path
    history: list[dict]

    @property
    def model(self) -> Path:
        return self.path / "model"


def run(
    recipe: "Recipe | dict | str | os.PathLike",
    *,
    resume: bool = False,
    output: str | os.PathLike | None = None,
    overrides: Sequence[str] = (),
    progress: Callable[[str, int, int, dict], None] | bool | None = None,
    dry_run: bool = False,
) -> Result:
    """Trains what `recipe` (a YAML file, a dict or a `Recipe`) says.

    resume: go on from the newest checkpoint in the output folder (from the start where there is none). output: the
    folder of everything written; else the recipe's `output`, else runs/NAME. overrides: "a.b=value" strings.
    progress: None: a bar on a terminal; False: silent; a callable gets (stage, done, total, facts) with the stages
    "teacher", "tokenise", "head", "train", "evaluate". dry_run: print what would be done, and write nothing.

    The folder holds model/ (sentence-transformers layout), history.jsonl, recipe.yaml and checkpoints/.
    Raises InputError (recipe or data are wrong), NonFiniteLossError, DamagedFileError; KeyboardInterrupt on SIGINT
    and SIGTERM once a checkpoint is saved.
    """
    from leafkern.errors import InputError

    try:
        import pydantic  # noqa: F401
        import yaml  # noqa: F401
    except ImportError as error:
        raise InputError(f"leafkern.train needs {error.name}: pip install 'leafkern[train]'") from None
    from leafkern.train.recipe import load_recipe

    checked = load_recipe(recipe, tuple(overrides))
    # torch is loaded only for a recipe that is right.
    from leafkern.train.stage import plan, train

    name = "leaf" if not isinstance(recipe, str | os.PathLike) else Path(recipe).stem
    folder = Path(output or checked.output or Path("runs") / name)
    if dry_run:
        print(plan(checked, folder), end="")
        return Result(folder, [])
    return Result(folder, train(checked, folder, resume=resume, progress=progress))
