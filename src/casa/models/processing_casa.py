"""CasaProcessor: chats with pictures to tokens without placeholders, patches, and where each picture stands."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import PROCESSOR_NAME
from transformers.utils.chat_template_utils import _compile_jinja_template, _get_template_variables

from casa.errors import UserError
from casa.media.pictures import ROUNDING, Channels, as_picture
from casa.models.chat_template import TemplateForm, TypedText, named_template, read_chat, render, template_form
from casa.models.loading import check_folder, reading, refuse_code, resolve, sentence_of
from casa.models.processor_arguments import Lengths, arguments


class Places(Tensor):
    """int64 (n, 2), a tensor like any other that refuses to be joined with those of another batch.

    Rows and indices hold for one padded batch. A pipeline of transformers asked for batch_size=2 would join the
    places of single chats and give all pictures to the first one. What is computed from places, or copied, is plain.
    """

    @staticmethod
    def of(pairs: Sequence[Sequence[int]]) -> "Places":
        """The places as (row, index) each."""
        return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).as_subclass(Places)

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


Row = tuple[list[int], list[int]]
"""Of one text: token ids without image tokens, and the indices before which pictures stand."""

IMAGE_TOKEN = "<image>"
# What templates of transformers' own models write for a picture.
_KNOWN_TOKENS = (IMAGE_TOKEN, "<|image_pad|>", "<|image|>", "<image_soft_token>", "[IMG]")
_FORMS = (None, "pt", "np")
_CHANNELS: dict[Any, Channels] = {"channels_first": "first", "channels_last": "last"}


class CasaProcessor(ProcessorMixin):
    """An image processor and a tokenizer, joined.

    Args:
        image_token: What the chat template writes for a picture. It marks the place and never reaches the model. Left
            out, it is the one that the tokenizer has and the template writes; else `<image>`, which the tokenizer is
            given.
        frame_prefix, frame_suffix: The delimiters that the template puts around a picture; a streamed frame gets the
            same ones. The suffix is the gist token of the paper (v2), where there is one.
        stream_prompt: What a live session asks the model for, unless told otherwise.
        stream_turns: A live session asks again with each frame, in a user's turn, as a model that learned from single
            pictures is asked; and it is silent where such a model says the same as of the frame before.
        gist_ids: Ids of the model's own gist tokens, which follow every picture (`FusionConfig.gist`).

    Raises:
        UserError: The tokenizer does not know the image token, or the image processor does not say how many patches a
            picture has. A broken template raises jinja2's own error.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str | None = None,
        frame_prefix: str = "",
        frame_suffix: str = "",
        stream_prompt: str = "Describe what is new.",
        stream_turns: bool = False,
        gist_ids: list[int] | None = None,
    ) -> None:
        self.gist_ids = list(gist_ids or ())
        self.stream_prompt, self.stream_turns = stream_prompt, stream_turns
        self.frame_prefix = frame_prefix
        self.frame_suffix = frame_suffix
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        # whoever pads with the tokenizer alone does it as generation needs it
        tokenizer.padding_side = "left"
        if "image_grid_thw" not in getattr(image_processor, "model_input_names", ()):
            raise UserError(
                f"{type(image_processor).__name__} does not say how many patches a picture has; "
                "make the image processor with casa.models.image_processor_for."
            )
        self.image_token: str = self._found_token() if image_token is None else image_token
        if self.image_token != IMAGE_TOKEN and not _knows(tokenizer, self.image_token):
            raise UserError(f"the tokenizer has no token {self.image_token!r}; name the one its template writes.")
        if self.image_token not in tokenizer.get_added_vocab():  # so that it is never cut into others
            special: Any = {"additional_special_tokens": [self.image_token]}
            tokenizer.add_special_tokens(special, replace_extra_special_tokens=False)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        _compile(chat_template or tokenizer.chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; `casa-tiny` names the checkpoint in the package.

        Raises UserError if it is no folder, or holds no processor that can be read without code of its own.
        """
        path = resolve(pretrained_model_name_or_path)
        check_folder(path, PROCESSOR_NAME, kwargs.get("subfolder") or "")
        refuse_code(kwargs)
        with reading(pretrained_model_name_or_path, "processor"):
            return super().from_pretrained(path, *args, trust_remote_code=False, **kwargs)

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokens (B, L) with `attention_mask`, and with images their patches, grids and `image_positions` (n, 2).

        images: one picture, a list for a single text, or a list of lists, one per text; every text holds the
        image token once per picture. A picture is whatever `casa.media.pictures.as_picture` takes, and read as it
        says. In a plain string all special tokens are tokens; in what `apply_chat_template` gives, only those that the
        template wrote. Other arguments are those of transformers' processors, flat or in text_kwargs, images_kwargs and
        common_kwargs. Left out, rows are padded to the longest on the tokenizer's side, which
        is the left, the tokenizer adds no special tokens, and all comes as tensors of torch.

        Raises UserError if pictures and places differ in number, for an argument that is not known, for a video, which
        is read frame by frame, and where truncation would cut a picture's place away.
        """
        if videos is not None:
            raise UserError("a video is read frame by frame; give its frames as images.")
        if audio is not None:
            raise UserError("casa models see and do not hear; leave audio out.")
        if text is None:
            raise UserError("give text; a picture alone asks nothing.")
        of_text, of_images = arguments(self.image_processor, kwargs)
        lengths = Lengths.of(of_text, self.tokenizer)
        texts = [text] if isinstance(text, str) else list(text)
        rows = [self._row(entry, of_text["add_special_tokens"], lengths.most) for entry in texts]
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
        data = self._padded(rows, lengths, of_text)
        if flat:
            data |= self._pixels(flat, of_images)
        return BatchFeature(data)

    def _padded(self, rows: list[Row], lengths: Lengths, told: dict[str, Any]) -> dict[str, Any]:
        """Rows of tokens side by side, with what else is asked for about them, in the form that is asked for."""
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        side = told.get("padding_side") or self.tokenizer.padding_side
        data: dict[str, Any] = {"input_ids": [], "attention_mask": []}
        positions = []
        for number, ((ids, places), length) in enumerate(
            zip(rows, lengths.padded([len(r[0]) for r in rows]), strict=True)
        ):
            empty = length - len(ids)
            left = empty if side == "left" else 0
            data["input_ids"].append([pad] * left + ids + [pad] * (empty - left))
            data["attention_mask"].append([0] * left + [1] * len(ids) + [0] * (empty - left))
            positions += [[number, left + place] for place in places]
        if len({len(row) for row in data["input_ids"]}) > 1 and told["return_tensors"] is not None:
            raise UserError("texts of different lengths need padding=True.")
        for name in ("token_type_ids", "mm_token_type_ids"):
            if told.get(f"return_{name}"):  # all is text: no picture has a token
                data[name] = [[0] * len(row) for row in data["input_ids"]]
        if told.get("return_length"):
            data["length"] = [len(row) for row in data["input_ids"]]
        if told.get("return_attention_mask") is False:
            del data["attention_mask"]
        kind = told["return_tensors"]
        if kind not in _FORMS:
            raise UserError(f"return_tensors is {kind!r}; give 'pt', 'np' or None.")
        if positions:
            data["image_positions"] = positions
        if kind is None:
            return data
        arrays = {name: np.array(held, dtype=np.int64) for name, held in data.items()}
        if kind == "np":
            return arrays
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return tensors | {"image_positions": Places.of(positions)} if positions else tensors

    def frame(self, image: Any, around: Row | None = None) -> tuple[list[int], list[int], dict[str, Any]]:
        """Token ids before and after a streamed frame (`around`, where known), and its pixels and grid."""
        return *(around or self.around_frame()), self._pixels([image], {"return_tensors": "pt"})

    def around_frame(self, prompt: str | None = None) -> tuple[list[int], list[int]]:
        """Token ids before and after a streamed frame: the delimiters, and gist tokens right behind it.

        With `stream_turns`, those of a user's turn that shows the frame and asks: the prompt, or the processor's own.
        """
        if self.stream_turns:
            ids, (place,) = self.turn(self.stream_prompt if prompt is None else prompt, shows=True)
            return ids[:place], ids[place:]
        before, after = (
            self.tokenizer.encode(text, add_special_tokens=False) if text else []
            for text in (self.frame_prefix, self.frame_suffix)
        )
        return before, self.gist_ids + after

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "auto",
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = True,
        **kwargs: Any,
    ) -> Any:
        """A chat, or a list of chats, as text or, with `tokenize=True`, as the model's inputs.

        As in transformers, with any template: one that knows only text, or writes something else for a picture, gets
        pictures as the image token within the text, and what a system says opens the user's turn if the template has no
        turn for it. Parts of messages are text and pictures (`read_chat`); a picture may stand beside the chat, in
        `images`, for an image part that holds none. Other keywords are the template's variables, or `__call__`'s.

        Args:
            chat_template: The name of one of several, or a text.
            sanitize_control_tokens: Words of people that look like special tokens are text; with False they are tokens.
                The text that comes without `tokenize` knows which of its words are such (`ChatText`): give it to the
                processor as it is.

        Raises:
            UserError: A part is neither text nor a picture, or the template is not there or loses the places of
                pictures. What the template itself raises, it raises.
        """
        if return_assistant_tokens_mask:
            raise UserError("return_assistant_tokens_mask is not supported; leave it out.")
        template = named_template(chat_template, (self.chat_template, self.tokenizer.chat_template), bool(tools))
        batched = isinstance(conversation, (list, tuple)) and bool(conversation)
        batched = batched and isinstance(conversation[0], (list, tuple))
        read = [read_chat(chat) for chat in (conversation if batched else [conversation])]
        known = _get_template_variables(template)
        settings = {name: kwargs.pop(name) for name in list(kwargs) if name not in known} | (processor_kwargs or {})
        beside = settings.pop("images", None)
        if return_tensors != "auto":  # which leaves it to `__call__`, as in transformers
            settings["return_tensors"] = return_tensors
        variables = {**self.tokenizer.special_tokens_map, **kwargs}
        form, typed = self.template_form(template), self.typed_text
        texts = []
        for messages, pictures in read:
            chat, held = messages, (tools, documents)
            marks = typed.marks(messages, *held) if sanitize_control_tokens else None
            if marks is not None:
                chat, held = marks.mark(messages), marks.mark(held)
            text = render(
                template,
                form.fit(chat, self.frame_prefix + self.image_token + self.frame_suffix),
                tools=held[0],
                documents=held[1],
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )
            texts.append(text if marks is None else marks.read(text))
            if (places := typed.count(texts[-1], self.image_token)) != len(pictures):
                raise UserError(
                    f"the chat template wrote {places} places for {len(pictures)} pictures; give another template, or "
                    "show pictures where it has places for them, in turns of the user."
                )
        if not tokenize:
            return texts if batched else texts[0]
        images = _filled([pictures for _, pictures in read], beside)
        inputs = self(
            text=texts if batched else texts[0],
            images=None if not any(images) else images if batched else images[0],
            **settings,
        )
        return inputs if return_dict else inputs["input_ids"]

    def _found_token(self) -> str:
        """The token for pictures that the tokenizer has, best the one that its template writes; `<image>` if none."""
        named = getattr(self.tokenizer, "image_token", None)
        known = [token for token in (named, *_KNOWN_TOKENS) if token is not None and _knows(self.tokenizer, token)]
        best = (*known, IMAGE_TOKEN)[0]
        try:
            return next((token for token in known if self.template_form(image_token=token).places), best)
        except UserError:  # none of its templates is the default
            return best

    @property
    def typed_text(self) -> TypedText:
        """What tells this tokenizer's special tokens from the same words typed by people."""
        return TypedText.of(self.tokenizer, (self.image_token,))

    def template_form(self, template: str | None = None, image_token: str | None = None) -> TemplateForm:
        """What a chat template takes. template: its text; the default one if left out. image_token: for a picture."""
        if template is None:
            template = named_template(None, (self.chat_template, self.tokenizer.chat_template))
        known = self.tokenizer.special_tokens_map.items()
        variables = tuple((name, value) for name, value in known if isinstance(value, str))
        return template_form(template, image_token or self.image_token, variables)

    def turn(self, question: str, opens: bool = False, shows: bool = False) -> Row:
        """Token ids of a user's turn up to its answer's first token, and the place of the picture that it shows.

        opens: It opens the text; another one leaves out the token that only opens texts, if the tokenizer has one.
        """
        chat = [{"role": "user", "content": [{"type": "image"}] * shows + [{"type": "text", "text": question}]}]
        ids, places = self.text_row(self.apply_chat_template(chat, add_generation_prompt=True))
        opening = self.tokenizer.bos_token_id
        first = int(not opens and ids[:1] == [opening] and ids.count(opening) == 1)  # one that opens turns stays
        return ids[first:], [place - first for place in places]

    @property
    def template_variables(self) -> frozenset[str]:
        """The names that the default chat template takes, besides messages and tokens."""
        return frozenset(
            _get_template_variables(named_template(None, (self.chat_template, self.tokenizer.chat_template)))
        )

    def text_row(self, text: str) -> Row:
        """The token ids of a rendered chat as `__call__` makes them, and the indices before which pictures stand."""
        return self._encoded(text, False)

    def _row(self, text: str, add_special_tokens: bool, most: int | None) -> Row:
        """Token ids without image tokens, and the indices before which pictures stand. Raises UserError if a picture's
        place is not among the ids that are left when there are more than `most`.
        """
        ids, places = self._encoded(text, add_special_tokens)
        if most is None or len(ids) <= most:
            return ids, places
        # of what the tokenizer itself puts around a text nothing is cut
        inner, places = self._encoded(text, False)
        around = len(ids) - len(inner)
        before = next(at for at in range(around + 1) if ids[at : at + len(inner)] == inner)
        start = len(inner) - max(0, most - around) if self.tokenizer.truncation_side == "left" else 0
        end = start + max(0, most - around)
        if lost := [at for at in places if at < start or at + max(1, len(self.gist_ids)) > end]:
            raise UserError(
                f"a text of {len(ids)} tokens cut to {most} would lose the places of {len(lost)} pictures; "
                "give a larger max_length, or shorter texts."
            )
        return ids[:before] + inner[start:end] + ids[before + len(inner) :], [before + at - start for at in places]

    def _encoded(self, text: str, add_special_tokens: bool) -> Row:
        ids, places = [], []
        for token in self.typed_text.encode(self.tokenizer, text, add_special_tokens):
            if token == self.image_token_id:
                places.append(len(ids))
                ids += self.gist_ids
            else:
                ids.append(token)
        return ids, places

    def _pixels(self, given: list[Any], told: dict[str, Any]) -> dict[str, Any]:
        """What the image processor makes of pictures in any form."""
        told = dict(told)
        layout = told.pop("input_data_format", None)
        channels_at = None if layout is None else _CHANNELS.get(getattr(layout, "value", layout))
        names = [f"Picture {number}" if len(given) > 1 else "The picture" for number in range(1, len(given) + 1)]
        pictures = [as_picture(one, name, channels_at) for one, name in zip(given, names, strict=True)]
        if told.get("do_rescale") is False and any(scaled := [_is_scaled(one) for one in given]):
            # as in transformers: they come scaled to 0..1, and the image processor leaves them there
            if not all(scaled):
                raise UserError(
                    "do_rescale=False needs pictures of one scale; give all as floats from 0 to 1, or none."
                )
            told |= {"do_rescale": True, "rescale_factor": 1 / 255}
        try:
            return dict(self.image_processor(images=pictures, **told))
        except (TypeError, ValueError, StrictDataclassError) as error:
            if asked := ", ".join(sorted(told.keys() - {"return_tensors"})):
                raise UserError(f"pictures cannot be prepared with this {asked}: {sentence_of(error)}") from error
            raise

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_grid_thw", "image_positions"]


def _is_scaled(picture: Any) -> bool:
    """Whether an array or tensor holds floats from 0 to 1."""
    return "float" in str(getattr(picture, "dtype", "")) and float(picture.max()) <= 1 + ROUNDING


def _knows(tokenizer: Any, token: str) -> bool:
    found = tokenizer.convert_tokens_to_ids(token)
    return found is not None and found != tokenizer.unk_token_id


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


def _filled(pictures: list[list[Any]], beside: Any) -> list[list[Any]]:
    """Each chat's pictures. beside: those of image parts that hold none, in order. Raises UserError."""
    given = _flat(beside)
    missing = sum(picture is None for held in pictures for picture in held)
    if len(given) != missing and beside is None:
        raise UserError("an image part holds no picture; give it there (image, url, path or base64), or as images.")
    if len(given) != missing:
        raise UserError(f"{len(given)} images were given for {missing} image parts that hold none; give one for each.")
    left = iter(given)
    return [[next(left) if picture is None else picture for picture in held] for held in pictures]
