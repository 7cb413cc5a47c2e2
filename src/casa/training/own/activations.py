"""What blocks keep for the backward pass, worked out from their widths: activations, as rows of a plan's memory.

Shapes: T tokens that the text model runs on, P patches of a pack's pictures, d and d_v widths of text model and tower,
L blocks of the text model, L_v blocks of the tower from the first that is trained on.

    checkpointed    T d L + P d_v L_v      the input of every block, and one block in full: that which is run again
    otherwise       every block in full

In full, a block keeps about as many numbers as go into its matrices and come out of them, and what a gate is multiplied
by: norms, queries, keys, values and the feed-forward network. Scores of attention are never kept. Frozen matrices keep
less than this, image tokens that are updated in every block (`update_images`) more.
"""

from typing import Any

from torch import nn

from casa.analysis.anatomy import matrix_features, tower_width
from casa.models import CasaForConditionalGeneration
from casa.models.adapt import encoder_blocks


def kept_by_blocks(
    model: CasaForConditionalGeneration, text: int, patches: int, size: int, checkpointed: bool
) -> dict[str, int]:
    """Bytes, by what they are for. model: with requires_grad as it will be; weights are not looked at.

    text, patches: T and P. size: bytes of a number that is computed with; the text model's sums between blocks are as
    wide as its embeddings.
    """
    embedding: Any = model.get_input_embeddings()
    encoder: Any = model.encoder
    texts = [_text_features(model, index) for index in range(len(model.decoder.blocks))]
    tower = [_features(block) for block in _trained_on(encoder_blocks(encoder))]
    if not checkpointed:
        return {"what blocks keep for the backward pass, about": size * (text * sum(texts) + patches * sum(tower))}
    between = text * embedding.embedding_dim * len(texts) * embedding.weight.element_size()
    return {
        "inputs of blocks, kept for the backward pass": between
        + patches * tower_width(encoder.config) * len(tower) * size,
        "one block in full, run again, about": size * max(text * max(texts), patches * max(tower, default=0)),
    }


def _text_features(model: CasaForConditionalGeneration, index: int) -> int:
    found = _features(model.decoder.blocks[index])
    # a fusion layer is made like the self-attention that it stands beside
    beside = index in model.fused_blocks and model.fusion.placement != "replace"
    return found + beside * matrix_features(model.decoder.attention(index))


def _features(block: nn.Module) -> int:
    gates = [part for name, part in block.named_modules() if name.endswith("gate_proj")]
    return matrix_features(block) + sum(gate.out_features for gate in gates)  # type: ignore[misc]


def _trained_on(blocks: nn.ModuleList) -> list[nn.Module]:
    """The blocks through which a gradient goes: from the first that has something to learn."""
    learns = [any(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
    return list(blocks)[learns.index(True) :] if any(learns) else []
