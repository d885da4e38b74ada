"""`atv inspect`: what an adapter does for single queries."""

from atv.cli.generate import gate_line, load_adapter
from atv.cli.options import Inspect
from atv.cli.output import print_lines, print_table
from atv.lm.hooks import decoder_layers
from atv.lm.lens import Readout, top_tokens
from atv.report.tables import Table


def inspect_queries(given: Inspect) -> None:
    """For each query, print the tokens that its vector promotes at each layer, read through the LLM's own head."""
    atv, prompts = load_adapter(given)
    read = [prompt.query for prompt in prompts]
    readout = Readout(atv.llm, atv.encode_prompts(prompts[:1]), atv.config.layer_path)
    vectors = (atv.config.scale * atv.task_vectors(read)).cpu()  # (queries, layers, hidden)
    layers = atv.config.layer_indices(len(decoder_layers(atv.llm, atv.config.layer_path)))
    note = (
        f"Read with {readout.described(atv.llm)}. Norm: norm of what is added at the layer. Promoted: the tokens whose "
        "logits the vector alone raises most."
    )
    for query, vector, gate in zip(given.query, vectors, atv.gate(read).tolist(), strict=True):
        promoted = top_tokens(readout.promoted(vector), atv.tokenizer)
        rows = [
            [str(layer), f"{own.norm():.2f}", "  ".join(repr(text) for text, _ in tokens)]
            for layer, own, tokens in zip(layers, vector, promoted, strict=True)
        ]
        print_lines([f"query:     {query}", gate_line(gate)])
        print_table(Table("Vectors by layer", ["layer", "norm", "promoted"], rows, note, text=1))
