"""CasaProcessor: chats with pictures to tokens without placeholders, patches, and where each picture stands."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import PROCESSOR_NAME
from transformers.utils.chat_template_utils import _compile_jinja_template

from casa.errors import UserError
from casa.media.pictures import as_picture
from casa.models.loading import check_folder, reading, refuse_code
from casa.models.places import Places
from casa.models.shipped import resolve


class CasaProcessor(ProcessorMixin):
    """An image processor and a tokenizer, joined.

    image_token: what the chat template writes for a picture. It marks the place and never reaches the model.
    frame_prefix, frame_suffix: the delimiters that the template puts around a picture; a streamed frame gets
        the same ones. The suffix is the gist token of the paper (v2, D5), where there is one.
    stream_prompt: what a live session asks the model for, unless told otherwise.
    gist_ids: ids of the model's own gist tokens, which follow every picture (`FusionConfig.gist`).
    Raises UserError for an image token that the tokenizer does not know, and jinja2's own error for a broken template.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        frame_prefix: str = "",
        frame_suffix: str = "",
        stream_prompt: str = "Describe what is new.",
        gist_ids: list[int] | None = None,
    ) -> None:
        self.gist_ids = list(gist_ids or ())
        self.stream_prompt = stream_prompt
        self.image_token = image_token
        self.frame_prefix = frame_prefix
        self.frame_suffix = frame_suffix
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        # whoever pads with the tokenizer alone does it as generation needs it
        tokenizer.padding_side = "left"
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise UserError(f"the tokenizer has no token {image_token!r}; name the one its template writes.")
        _compile(chat_template or tokenizer.chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; `casa-tiny` names the checkpoint in the package.

        Raises UserError if it is no folder, or holds no processor that can be read without code of its own.
        """
        path = resolve(pretrained_model_name_or_path)
        check_folder(path, PROCESSOR_NAME)
        refuse_code(kwargs)
        with reading(pretrained_model_name_or_path, "processor"):
            return super().from_pretrained(path, *args, trust_remote_code=False, **kwargs)

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        padding_side: str = "left",
        add_special_tokens: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokens (B, L) with `attention_mask`, and with images their patches, grids and `image_positions` (n, 2).

        images: one picture, a list for a single text, or a list of lists, one per text; every text holds the
        image token once per picture. A picture is whatever `casa.media.pictures.as_picture` takes, and read as it
        says. Rows are padded on the left. Raises UserError if pictures and places differ in number, or for a video,
        which is read frame by frame.
        """
        if videos is not None:
            raise UserError("a video is read frame by frame; give its frames as images.")
        if text is None:
            raise UserError("give text; a picture alone asks nothing.")
        if unknown := sorted(name for name, value in kwargs.items() if value is not None and value is not False):
            raise UserError(f"the processor does not know {', '.join(unknown)}; leave that out.")
        if return_tensors not in ("pt", None):
            raise UserError(f"return_tensors is {return_tensors!r}; only 'pt' is supported.")
        texts = [text] if isinstance(text, str) else list(text)
        rows = [self._row(entry, add_special_tokens) for entry in texts]
        flat = _flat(images)
        wanted = sum(len(places) for _, places in rows)
        if len(flat) != wanted:
            raise UserError(
                f"the text has places for {wanted} pictures, but {len(flat)} were given; "
                f"write {self.image_token} where each picture stands."
            )
        by_text = [len(places) for _, places in rows]
        if len(rows) > 1 and (given := _per_text(images)) not in (None, by_text):
            raise UserError(f"the texts have places for {by_text} pictures, but were given {given}; give each its own.")
        length = max((len(ids) for ids, _ in rows), default=0) if padding else None
        if length is None and len({len(ids) for ids, _ in rows}) > 1:
            raise UserError("texts of different lengths need padding=True.")
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        input_ids, mask, positions = [], [], []
        for number, (ids, places) in enumerate(rows):
            empty = (length or len(ids)) - len(ids)
            left = empty if padding_side == "left" else 0
            input_ids.append([pad] * left + ids + [pad] * (empty - left))
            mask.append([0] * left + [1] * len(ids) + [0] * (empty - left))
            positions += [(number, left + place) for place in places]
        data: dict[str, Any] = {"input_ids": torch.tensor(input_ids), "attention_mask": torch.tensor(mask)}
        if flat:
            named = [f"Picture {number}" if len(flat) > 1 else "The picture" for number in range(1, len(flat) + 1)]
            pictures = [as_picture(*given) for given in zip(flat, named, strict=True)]
            data |= self.image_processor(images=pictures, return_tensors="pt")
            data["image_positions"] = Places.of(positions)
        return BatchFeature(data)

    def frame(self, image: Any) -> tuple[list[int], list[int], dict[str, Any]]:
        """A streamed frame, in any form that `casa.media.pictures.as_picture` takes: token ids before it, token ids
        after it, and its pixels and grid.
        """
        before = self.tokenizer.encode(self.frame_prefix, add_special_tokens=False) if self.frame_prefix else []
        after = self.tokenizer.encode(self.frame_suffix, add_special_tokens=False) if self.frame_suffix else []
        return (
            before,
            self.gist_ids + after,
            dict(self.image_processor(images=[as_picture(image)], return_tensors="pt")),
        )

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As in transformers, and for templates that know only text: pictures stand in it as the image token.

        Raises UserError for video content: give its frames as images.
        """
        for part in _parts(conversation):
            if part.get("type") == "video":
                raise UserError("a video is read frame by frame; give its frames as image parts.")
        template: Any = chat_template or self.chat_template or self.tokenizer.chat_template or ""
        if "image" in template:
            return super().apply_chat_template(conversation, chat_template, **kwargs)
        return self._text_only_template(conversation, template, **kwargs)

    def _text_only_template(
        self,
        conversation: Any,
        template: str,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        place = self.frame_prefix + self.image_token + self.frame_suffix
        images = [
            next((part[key] for key in ("image", "url", "path", "base64") if part.get(key) is not None), None)
            for part in _parts(conversation)
            if part.get("type") == "image"
        ]
        settings = {name: kwargs.pop(name) for name in ("padding", "padding_side") if name in kwargs}
        text = self.tokenizer.apply_chat_template(
            _flattened(conversation, place), chat_template=template, tokenize=False, **kwargs
        )
        if not tokenize:
            return text
        settings |= processor_kwargs or {}
        inputs = self(images=images or None, text=text, return_tensors=return_tensors, **settings)
        return inputs if return_dict else inputs["input_ids"]

    def _row(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[int]]:
        """Token ids without image tokens, and the indices before which pictures stand."""
        ids, places = [], []
        for token in self.tokenizer.encode(text, add_special_tokens=add_special_tokens):
            if token == self.image_token_id:
                places.append(len(ids))
                ids += self.gist_ids
            else:
                ids.append(token)
        return ids, places

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_grid_thw", "image_positions"]


def _compile(template: Any) -> None:
    """Tries a chat template, or several by name, so that a broken one shows at once; what is compiled is kept."""
    for text in template.values() if isinstance(template, dict) else [template or ""]:
        _compile_jinja_template(text)


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [picture for entry in images for picture in _flat(entry)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _per_text(images: Any) -> list[int] | None:
    """How many pictures each text is given; None where they come as one list for all."""
    if not isinstance(images, (list, tuple)) or not all(isinstance(entry, (list, tuple)) for entry in images):
        return None
    return [len(_flat(entry)) for entry in images]


def _parts(conversation: Any) -> Iterator[dict[str, Any]]:
    """All content parts of a chat, or of a list of chats, in order."""
    for entry in conversation or ():
        if isinstance(entry, (list, tuple)):
            yield from _parts(entry)
        elif isinstance(content := entry.get("content"), list):
            yield from (part for part in content if isinstance(part, dict))


def _flattened(conversation: Any, place: str) -> Any:
    """The same chats with text for content, pictures being `place`."""
    found = []
    for entry in conversation:
        if isinstance(entry, (list, tuple)):
            found.append(_flattened(entry, place))
        elif isinstance(entry.get("content"), list):
            texts = [place if part.get("type") == "image" else part.get("text", "") for part in entry["content"]]
            found.append({**entry, "content": "".join(texts)})
        else:
            found.append(entry)
    return found
