"""What an ATV does for one query, in sentences and as a table."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from atv.report.tables import MISSING, Table

if TYPE_CHECKING:
    from atv.evaluation.inspect import Distance, Inspection, LayerLens, Said

LONGEST = 100
"""Most characters of a query or an answer that are shown."""


def inspection_lines(found: "Inspection", note: str = "") -> list[str]:
    """Return sentences about a query, in lines of text.

    Args:
        found: from `inspect_query`.
        note: why the nearest training queries are not there, or why they may be those of other rows.
    """
    lines = [f"Query: {shortened(found.query)}"]
    lines += ["It is cut at its end, since the LLM's context has no room for all of it.", ""] if found.cut else [""]
    lines += [_distance(found.gate, found.distance)]
    if found.nearest is None:
        lines += [f"The nearest training queries are left out: {note}"] if note else []
    else:
        drawn = f", drawn at random from {found.training}," if found.compared < found.training else ""
        lines += [f"The {len(found.nearest)} nearest of {found.compared} training queries{drawn} and their answers:"]
        several = len({near.task for near in found.nearest}) > 1
        for near in found.nearest:
            where = f" ({near.task})" if several else ""
            lines += [f"  {near.cosine:.2f}  {shortened(near.query)}{where} -> {shortened(near.answer)}"]
        lines += [f"They may not be rows of the training: {note}"] if note else []
    lines += ["", _said("Without vectors the LLM", found.plain), _said("With them it", found.steered)]
    return [*lines, "", *_promoted(found)]


def shortened(text: str) -> str:
    """Return a text in one line, quoted, with its middle left out if it is long."""
    line = " ".join(text.split())
    half = LONGEST // 2
    return repr(line if len(line) <= LONGEST else f"{line[:half].rstrip()} ... {line[-half:].lstrip()}")


def _distance(gate: float, distance: "Distance | None") -> str:
    if distance is None:
        return "The adapter has no gate: every query gets its own part of the vectors in full."
    like = {1.0: "near", 0.0: "far from"}.get(distance.share, "at some distance from")
    line = (
        f"It is {like} the training queries: its mean cosine to the three nearest is {distance.nearness:.2f}, that of "
        f"training queries to each other {distance.typical:.2f}. The gate begins to close below {distance.opened:.2f} "
        f"and is closed at {distance.closed:.2f}. "
    )
    factors = [(distance.share, "for the distance"), (distance.strength, "chosen on its task's validation rows")]
    why = ", ".join(f"{factor:.2f} {reason}" for factor, reason in factors if factor < 1)
    if gate == 1:
        return f"{line}Here it is 1: the query's own part of the vectors is added in full."
    if gate == 0:
        return f"{line}Here it is 0 ({why}): nothing of the query's own part of the vectors is added."
    return f"{line}Here it is {gate:.2f} ({why}): {gate:.0%} of the query's own part of the vectors is added."


def _said(who: str, said: "Said") -> str:
    writes = f"writes {shortened(said.text)}" if said.text else "writes nothing"
    if said.probabilities is None:
        return f"{who} {writes}."
    return f"{who} answers {said.answer!r} ({said.probabilities[said.answer]:.0%} among the options) and {writes}."


def _promoted(found: "Inspection") -> list[str]:
    if not found.layers:
        return [f"The layers cannot be read: {found.lens}"]
    if not found.compared_answers:
        return ["The vectors do not change the answer; the table shows the likeliest next token after each layer."]
    last = len(found.layers) - 1
    if found.promoted is None:
        return ["The vectors promote no answer: they change the scores of all of them alike."]
    by_layer = (
        f"of {len(found.compared_answers)} answers they raise its score most, at each layer from {found.promoted_from} "
        f"on (layers 0 to {last})"
    )
    lines = [f"The vectors promote {shortened(found.promoted)}: {by_layer}."]
    plain = max(found.layers[-1].plain, key=found.layers[-1].plain.__getitem__)
    without = "also without them" if plain == found.leader else f"without them {shortened(plain)} is"
    if found.leader == found.promoted:
        lines += [f"It is the likeliest answer from layer {found.leads_from} on; {without} at the last layer."]
    else:
        leads = f"{shortened(str(found.leader))} {'stays' if plain == found.leader else 'is'} the likeliest"
        whole = found.steered.probabilities is None or found.steered.answer == found.leader
        lines += [f"That is not enough: {leads} answer." if whole else f"At the last layer {leads} all the same."]
    return [*lines, *_judged_otherwise(found, plain)]


def _judged_otherwise(found: "Inspection", plain: str) -> list[str]:
    """Why the likeliest answer at the last layer, `plain` without vectors, is not the LLM's answer."""
    sides = (("Without vectors", plain, found.plain), ("With them", found.leader, found.steered))
    differ = [
        f"{who} these favour {leads!r}, and the whole answer with its end is likelier for {said.answer!r}."
        for who, leads, said in sides
        if said.probabilities and leads != said.answer
    ]
    return [f"(Layers judge answers by the tokens that tell them apart. {' '.join(differ)})"] if differ else []


def inspection_table(found: "Inspection") -> Table:
    """Return the lens of each decoder layer: answers if there are answers to compare, else tokens."""
    answers = bool(found.compared_answers)
    what = "answer" if answers else "next token"
    rows = [
        [
            str(lens.layer),
            _likeliest(lens.plain, lens.plain_tokens),
            _likeliest(lens.steered, lens.steered_tokens),
            *([MISSING if lens.raised is None else _cell(lens.raised)] if answers else []),
            _alone(lens, answers),
            MISSING if lens.norm is None else f"{lens.norm:.2f}",
            MISSING if lens.norm is None else f"{100 * lens.norm / max(lens.stream, 1e-9):.1f}",
        ]
        for lens in found.layers
    ]
    raised = ["raised most"] if answers else []
    columns = ["layer", "without", "with", *raised, "vector alone", "norm", "% of stream"]
    by = "judged by the tokens that tell answers apart" if answers else "over the whole vocabulary"
    note = (
        f"What the LLM would answer if it ended after a layer, without and with the vectors: the likeliest {what} and "
        f"its probability, {by}, read with {found.lens}. "
        + ("Raised most: the answer whose score the vectors raise most. " if answers else "")
        + f"Vector alone: the {'answer' if answers else 'token'} that the layer's vector raises most when it is read "
        "directly; in low layers it acts through the layers above instead. Norm: of the added vector, and as % of the "
        "residual stream there."
    )
    return Table("Layer by layer", columns, rows, note, text=5 if answers else 4)


def _likeliest(answers: Mapping[str, float], tokens: list[list[Any]]) -> str:
    if answers:
        text = max(answers, key=answers.__getitem__)
        return f"{_cell(text)} {answers[text]:.0%}"
    token, probability = tokens[0]
    return f"{token!r} {probability:.0%}"


def _alone(lens: "LayerLens", answers: bool) -> str:
    if answers:
        return MISSING if lens.alone is None else _cell(lens.alone)
    return repr(lens.alone_tokens[0][0]) if lens.alone_tokens else MISSING


def _cell(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 30 else f"{line[:27]}..."
