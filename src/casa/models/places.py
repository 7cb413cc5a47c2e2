"""Where a processor puts the pictures of its batch: (row, index) of each, for that batch and no other."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from casa.errors import UserError


class Places(Tensor):
    """int64 (n, 2), a tensor like any other that refuses to be joined with those of another batch.

    Rows and indices hold for one padded batch. A pipeline of transformers asked for batch_size=2 would join the
    places of single chats and give all pictures to the first one. What is computed from places, or copied, is plain.
    """

    @staticmethod
    def of(pairs: Iterable[tuple[int, int]]) -> "Places":
        """The places as (row, index) each."""
        return torch.tensor(list(pairs), dtype=torch.int64).reshape(-1, 2).as_subclass(Places)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.as_subclass(Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # so that a saved batch can be loaded by `torch.load`, which knows plain tensors only
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.cat, torch.concat, torch.stack) and sum(isinstance(part, Places) for part in args[0]) > 1:
            raise UserError(
                "image_positions of several batches cannot be joined: give the processor all texts at once, "
                "or leave a pipeline's batch_size at 1."
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
