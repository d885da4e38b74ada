"""`atv card`: complete an adapter's model card before the adapter is shared."""

from atv import artifact
from atv.cli.options import Card
from atv.cli.output import print_lines
from atv.errors import ATVError
from atv.files import local
from atv.lm.identity import public_name
from atv.report.card import write_card


def complete_card(given: Card) -> None:
    """Write what the options say into the adapter's model card."""
    about = {"license": given.license, "language": given.language, "datasets": given.dataset}
    if not (given.results or any(about.values())):
        raise ATVError("There is nothing to write; give --results, --license, --language or --dataset.")
    if not local(given.adapter).exists():
        raise ATVError(f"{given.adapter} does not exist; expected an adapter's folder on this machine.")
    folder = artifact.locate(given.adapter)
    saved = artifact.read(folder)
    card = folder / artifact.CARD_FILE
    title = f"{saved.method} for {public_name(saved.base_llm['name'])}"
    write_card(card, title, artifact.identity(folder), about, given.results or ())
    print_lines([f"Model card: {card}"])
