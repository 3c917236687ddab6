"""Write the tables of docs/models.md anew, and time every network for them: make models-table"""

import re
from pathlib import Path

import click
import torch
from tqdm import tqdm

from lipprep.stages.atomic import write_text
from lipprep.train import table
from lipprep.train.config import recipes
from lipprep.train.device import choose_device

PAGE = Path(__file__).parents[1] / "docs" / "models.md"


def filled(page: str, name: str, lines: list[str]) -> str:
    """The page with these lines between its comments `NAME` and `end of NAME`."""
    between = re.compile(rf"(<!-- {name}\b[^\n]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if len(between.findall(page)) != 1:
        raise ValueError(f"{PAGE} has no place for its table {name}")
    return between.sub(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], page)


@click.command()
@click.option("--device", default="cpu", show_default=True, help="Where the networks are timed.")
def main(device: str) -> None:
    """Write the tables of recipes, trunks and heads in docs/models.md."""
    where = choose_device(device)
    names = recipes()
    found = list(tqdm(table.rows(names, device=where), total=len(names), unit="network", disable=None))
    page = filled(PAGE.read_text(encoding="utf-8"), "recipes", table.as_markdown(found))
    page = filled(filled(page, "trunks", table.trunks()), "heads", table.heads())
    write_text(PAGE, page)
    click.echo(f"{PAGE}: {len(found)} networks, timed on {where} with {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
