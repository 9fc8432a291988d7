"""Conversations from files and data sets, which of their tokens are trained, batches, and the check of a data set."""

from __future__ import annotations

import copy
import io
import json
import pickle

import datasets
import pytest
import torch
from PIL import Image
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from tokenizers import processors as processors_of_tokens
from transformers import (
    AutoProcessor,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from msd_hf.errors import MSDDataError, MSDError
from msd_hf.prompts import build_chat_inputs
from msd_hf.toy import TARGET_DIR, write_dataset
from msd_hf.training.data.check import check_conversations, render_report
from msd_hf.training.data.conversations import REASONS, Conversation, load_conversations
from msd_hf.training.data.encoding import ConversationEncoder, collate_conversations
from msd_hf.training.data.expansion import TokenizerRecorder, align, move


LLAVA_TEMPLATE = (  # of llava-hf/llava-1.5-7b-hf: images come first; a space and no end token follows each answer
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML_TEMPLATE = (  # of Qwen2-VL, without generation marks: a line break follows the token that ends a turn
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><image><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A prompt with an open answer differs from the written answer, so only the generation marks show where it is.
THINKING_TEMPLATE = CHATML_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}").replace(
    "{{ part['text'] }}",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ part['text'] }}{% endif %}",
)
THINKING_TEMPLATE = THINKING_TEMPLATE.replace(
    "{% endfor %}<|im_end|>", "{% endfor %}{% if message['role'] != 'assistant' %}<|im_end|>{% endif %}"
)
LLAMA2_TEMPLATE = (  # texts only; a space before the end token
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PLAIN_TEMPLATE = (  # a line break ends a turn, and a space ends a prompt
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{{ part['text'] }}{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
FORGETFUL_TEMPLATE = (  # shows only the last turn of the assistant
    "{% for message in messages %}{% if loop.last or message['role'] == 'user' %}{{ message['role'] + ':' }}"
    "{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
RED, GREEN = Image.new("RGB", (60, 40), "red"), Image.new("RGB", (30, 70), "green")


@pytest.fixture(scope="module")
def toy():
    return AutoProcessor.from_pretrained(TARGET_DIR)


def add_tokens(tokenizer, *tokens):
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def processors(toy):
    """The toy processor, copies of it with other templates and tokenizers, and small ones of other families."""
    chatml = copy.deepcopy(toy)
    add_tokens(chatml.tokenizer, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
    chatml.chat_template = CHATML_TEMPLATE
    llava = copy.copy(toy)
    llava.chat_template = LLAVA_TEMPLATE
    sentencepiece = copy.copy(toy)
    sentencepiece.tokenizer = build_sentencepiece()
    sentencepiece.chat_template = LLAVA_TEMPLATE
    thinking = copy.copy(chatml)
    thinking.chat_template = THINKING_TEMPLATE
    bos = copy.copy(toy)
    bos.tokenizer = sentencepiece.tokenizer
    trimmed = copy.deepcopy(chatml)  # as for Qwen2: a token's offsets exclude the white space before it
    trimmed.tokenizer.backend_tokenizer.post_processor = processors_of_tokens.ByteLevel(trim_offsets=True)
    return {
        "toy": toy,
        "chatml": chatml,
        "llava": llava,
        "sentencepiece": sentencepiece,
        "bos": bos,
        "trimmed": trimmed,
        "thinking": thinking,
        "next": build_llava_next(chatml.tokenizer),
        "gemma": build_gemma(chatml.tokenizer),
        "qwen": build_qwen(chatml.tokenizer),
    }


def build_llava_next(tokenizer):
    """Images differ in their numbers of patches and tokens, and transformers 5.10 does not say where they expand."""
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    return LlavaNextProcessor(
        image_processor, tokenizer, 14, "default", CHATML_TEMPLATE, num_additional_image_tokens=1
    )


def build_gemma(tokenizer):
    """Writes line breaks around images, and returns an array with one value per token."""
    tokenizer = copy.deepcopy(tokenizer)
    for name, token in (("image", "<soft>"), ("boi", "<begin>"), ("eoi", "<end>")):
        add_tokens(tokenizer, token)
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    template = CHATML_TEMPLATE.replace("<|vision_start|><image><|vision_end|>", "<begin>")
    image_processor = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return Gemma3Processor(image_processor, tokenizer, chat_template=template, image_seq_length=4)


class Qwen2VLProcessorWithoutVideo(Qwen2VLProcessor):
    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def build_qwen(tokenizer):
    """Returns the patches of all images in one array, one after another."""
    tokenizer = add_tokens(copy.deepcopy(tokenizer), "<video>")
    tokenizer.image_token, tokenizer.video_token = "<image>", "<video>"
    image_processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=8 * 28 * 28)
    return Qwen2VLProcessorWithoutVideo(image_processor, tokenizer, None, chat_template=CHATML_TEMPLATE)


def build_sentencepiece() -> PreTrainedTokenizerFast:
    """Like Llama's tokenizer: a space belongs to the following word, also in the offsets of a token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", "<image>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    text = "USER: What is this? ASSISTANT: Red. A box, and another one here. Green. Hello Yes No Thanks"
    tokenizer.train_from_iterator(text.split() * 3, trainer)  # single words, because no merge crosses a space
    tokenizer.post_processor = processors_of_tokens.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    # Byte tokens are not special tokens.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:4]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def turn(role, *parts):
    """A message; `None` stands for an image."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


CHATS = {
    "one image": Conversation("one", [turn("user", None, "What is this?"), turn("assistant", "Red.")], (RED,)),
    "several images, odd characters": Conversation(
        "several",
        [
            turn("user", None, "What is\n this?"),
            turn("assistant", "Red é😀.\n\n A box"),
            turn("user", "And here: ", None, " or ", None, "?"),
            turn("assistant", "Green."),
        ],
        (RED, GREEN, RED),
    ),
    "image in a later turn": Conversation(
        "later",
        [
            turn("user", "Hello"),
            turn("assistant", "Hello"),
            turn("user", "Hello", None),
            turn("assistant", "Hello"),
            turn("user", "Hello"),
            turn("assistant", "Hello"),
        ],
        (GREEN,),
    ),
    "text only": Conversation("text", [turn("user", "Yes"), turn("assistant", "Yes\n\nYes")]),
    "unanswered at the end": Conversation(
        "open", [turn("user", None, "Yes"), turn("assistant", "No"), turn("user", None, "Yes?")], (RED, GREEN)
    ),
}


def answers_of(conversation):
    return [message["content"][0]["text"] for message in conversation.messages if message["role"] == "assistant"]


def trained_runs(sample, tokenizer):
    """The text of each run of trained tokens."""
    runs, ids, mask = [], sample["input_ids"].tolist(), [False, *sample["assistant_mask"].tolist(), False]
    begins = [place for place in range(len(ids)) if mask[place + 1] and not mask[place]]
    for begin in begins:
        end = next(place for place in range(begin, len(ids) + 1) if not mask[place + 1])
        runs.append(tokenizer.decode(ids[begin:end]))
    return runs


NAMES = ["toy", "chatml", "llava", "sentencepiece", "bos", "trimmed", "thinking", "next", "gemma", "qwen"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chat", CHATS)
def test_answers_with_their_end_are_trained_and_nothing_else(name, chat, processors):
    processor, conversation = processors[name], CHATS[chat]
    sample = ConversationEncoder(processor)(conversation)
    ids, mask = sample["input_ids"], sample["assistant_mask"]
    assert ids.dtype == torch.long and mask.dtype == torch.bool and ids.shape == mask.shape
    assert "attention_mask" not in sample

    answers = answers_of(conversation)
    ends = ["</s>"] * len(answers) if name in ("toy", "bos") else ["<|im_end|>"] * len(answers)
    if name in ("llava", "sentencepiece"):  # this template ends no turn, but the last answer gets an end token
        ends = [""] * (len(answers) - 1) + ["</s>"]
    runs = trained_runs(sample, processor.tokenizer)
    assert [run.removeprefix(" ") for run in runs] == [a + end for a, end in zip(answers, ends, strict=True)]

    assert (ids == processor.tokenizer.bos_token_id).sum() == (name in ("toy", "sentencepiece", "bos"))
    # The prompt of generation ends where training begins.
    if name == "thinking":
        return
    for place, message in enumerate(conversation.messages):
        if message["role"] == "assistant":
            before = conversation.messages[:place]
            num_images = sum(part["type"] == "image" for m in before for part in m["content"])
            inputs = build_chat_inputs(processor, before, conversation.images[:num_images])
            prompt = inputs["input_ids"][0]
            assert torch.equal(ids[: len(prompt)], prompt)
            assert mask[len(prompt)] and not mask[len(prompt) - 1]


@pytest.mark.parametrize("name", NAMES)
def test_white_space_of_an_answer_is_trained_as_the_target_writes_it(name, processors):
    answer = "\n\nYes,\n\n  No \n"
    messages = [turn("user", "Hello"), turn("assistant", answer), turn("user", "A\n"), turn("assistant", answer)]
    processor = processors[name]
    runs = trained_runs(ConversationEncoder(processor)(Conversation("x", messages)), processor.tokenizer)
    if name in ("llava", "sentencepiece"):  # white space at the end is not trained: the template writes its own
        assert [run.lstrip(" ") for run in runs] == [answer.rstrip(), answer.rstrip() + "</s>"]
    else:
        end = "</s>" if name in ("toy", "bos") else "<|im_end|>"
        assert [run.lstrip(" ") for run in runs] == [answer + end] * 2


@pytest.mark.parametrize(
    "answer, complete, trained",
    [
        ("\nYes", True, "\nYes</s>"),
        (" \nYes", True, " \nYes</s>"),
        ("\nYes \n", True, "\nYes</s>"),
        ("\nYes and ", False, "\nYes and "),
    ],
)
def test_spaces_that_offsets_exclude(answer, complete, trained, processors):
    processor = copy.copy(processors["trimmed"])
    processor.chat_template = PLAIN_TEMPLATE
    messages = [turn("user", "Hello"), turn("assistant", answer)]
    sample = ConversationEncoder(processor)(Conversation("x", messages * 2, complete=complete))
    assert trained_runs(sample, processor.tokenizer) == [answer.rstrip(), trained]


@pytest.mark.parametrize("name", ["qwen", "gemma"])
def test_values_per_token_are_padded_like_tokens(name, processors):
    encoder = ConversationEncoder(processors[name])
    samples = [encoder(CHATS[chat]) for chat in ("several images, odd characters", "one image", "text only")]
    key = "mm_token_type_ids" if name == "qwen" else "token_type_ids"
    assert all(sample[key].shape == sample["input_ids"].shape for sample in samples)
    batch = collate_conversations(samples, 0)
    assert batch[key].shape == batch["input_ids"].shape
    image_token = encoder.tokenizer.convert_tokens_to_ids("<image>" if name == "qwen" else "<soft>")
    assert torch.equal(batch[key], (batch["input_ids"] == image_token).long())
    if name == "qwen":
        assert batch["image_grid_thw"].shape == (4, 3)
        assert len(batch["pixel_values"]) == batch["image_grid_thw"].prod(-1).sum()
        assert batch[key].sum() == len(batch["pixel_values"]) / 4


def test_images_are_what_the_processor_makes_of_them(processors):
    conversation = CHATS["several images, odd characters"]
    sample = ConversationEncoder(processors["toy"])(conversation)
    expected = processors["toy"].image_processor(list(conversation.images), return_tensors="pt")["pixel_values"]
    assert torch.equal(sample["pixel_values"], expected) and expected.shape[0] == 3
    assert (sample["input_ids"] == processors["toy"].image_token_id).sum() == 3 * 36
    # An unanswered turn is left out with its image.
    sample = ConversationEncoder(processors["toy"])(CHATS["unanswered at the end"])
    assert torch.equal(sample["pixel_values"], expected[:1])


@pytest.mark.parametrize("name", ["toy", "chatml", "sentencepiece"])
def test_no_end_is_trained_after_an_answer_that_was_cut(name, processors):
    messages = [*CHATS["image in a later turn"].messages[:3], turn("assistant", "Hello and")]
    processor = processors[name]
    encoder = ConversationEncoder(processor)
    whole, cut = (trained_runs(encoder(Conversation("x", messages, (RED,), c)), processor.tokenizer) for c in (1, 0))
    assert whole[:-1] == cut[:-1]
    assert cut[-1].strip() == "Hello and" and whole[-1] == cut[-1] + ("<|im_end|>" if name == "chatml" else "</s>")


def test_text_only_tokenizer(toy):
    tokenizer = copy.deepcopy(toy.tokenizer)
    tokenizer.chat_template = LLAMA2_TEMPLATE
    messages = [*CHATS["text only"].messages, turn("user", "Hello"), turn("assistant", " So. ")]
    encoder = ConversationEncoder(tokenizer)
    sample = encoder(Conversation("x", messages))
    assert set(sample) - {"token_type_ids"} == {"input_ids", "assistant_mask"}
    assert trained_runs(sample, tokenizer) == [" Yes\n\nYes </s>", " So. </s>"]
    assert tokenizer.decode(sample["input_ids"]).startswith("<s>[INST] Yes [/INST] Yes")
    with pytest.raises(MSDDataError) as error:
        encoder(CHATS["one image"])
    assert error.value.reason == "image for a text-only target" and error.value.sample_id == "one"


@pytest.mark.parametrize(
    "template, message",
    [(FORGETFUL_TEMPLATE, "does not show where an answer begins"), (None, "has no chat template")],
)
def test_unusable_templates_are_refused_before_any_sample(template, message, toy):
    processor = copy.copy(toy)
    processor.chat_template = template
    with pytest.raises(MSDError, match=message) as error:
        ConversationEncoder(processor)
    assert not isinstance(error.value, MSDDataError)


@pytest.mark.parametrize("name", ["toy", "chatml", "sentencepiece", "next"])
def test_a_tokenizer_that_lies_about_characters_never_gives_a_wrong_mask(name, processors, monkeypatch):
    encoder = ConversationEncoder(processors[name])
    num_errors = 0
    for conversation in CHATS.values():
        runs = trained_runs(encoder(conversation), encoder.tokenizer)
        for shift in (-9, -4, -3, -2, -1, 1, 2, 3, 4, 9):

            def lie(self, *args, original=TokenizerRecorder.__call__, shift=shift, **kwargs):
                encoding = original(self, *args, **kwargs)
                self.offsets = (self.offsets + shift).clamp(0)
                return encoding

            with monkeypatch.context() as patch:
                patch.setattr(TokenizerRecorder, "__call__", lie)
                try:
                    found = trained_runs(encoder(conversation), encoder.tokenizer)
                except MSDDataError as error:
                    assert error.reason == "tokenization"
                    num_errors += 1
                else:  # runs may differ in white space
                    assert [run.strip() for run in found] == [run.strip() for run in runs]
    assert num_errors > 8 * len(CHATS)


def test_alignment_of_expanded_texts():
    rendered, expanded = "a<i>b<i><i>c\nd", "a[<i><i>]\nb<i>\n<i>c\nd"
    stretches = align(rendered, expanded, ["<i>"])
    for piece in ("a", "b", "c\nd"):
        begin, end = move((rendered.index(piece), rendered.index(piece) + len(piece)), stretches)
        assert expanded[begin:end] == piece
    with pytest.raises(MSDError, match="hold an image"):
        move((0, 5), stretches)
    for changed in (" " + expanded, expanded + " ", expanded.replace("b", "B"), "a"):
        with pytest.raises(MSDError, match="changes the text"):
            align(rendered, changed, ["<i>"])


@pytest.mark.parametrize("name", ["toy", "next"])
def test_long_samples_are_cut_but_no_image_is(name, processors):
    conversation = Conversation(
        "long",
        [turn("user", None, "Yes"), turn("assistant", "No"), turn("user", "Hello"), turn("assistant", "a b c " * 20)],
        (RED,),
    )
    processor = processors[name]
    whole = ConversationEncoder(processor)(conversation)
    length = len(whole["input_ids"])
    first = int(whole["assistant_mask"].nonzero()[0])
    assert len(ConversationEncoder(processor, length)(conversation)["input_ids"]) == length
    for max_length in (first + 1, length - 30, length - 1):
        sample = ConversationEncoder(processor, max_length)(conversation)
        for key in ("input_ids", "assistant_mask"):
            assert torch.equal(sample[key], whole[key][:max_length])
        assert torch.equal(sample["pixel_values"], whole["pixel_values"])
    images = (whole["input_ids"] == processor.image_token_id).nonzero()[:, 0]
    for max_length in (1, int(images[3]), int(images[-1]), first):
        with pytest.raises(MSDDataError, match=f"{length} tokens, {max_length} are allowed") as error:
            ConversationEncoder(processor, max_length)(conversation)
        assert error.value.reason == "too long"
    # An answer fits, but the image of a later turn does not.
    later = Conversation("later", [turn("user", "Yes"), turn("assistant", "No"), *conversation.messages], (RED,))
    images = (ConversationEncoder(processor)(later)["input_ids"] == processor.image_token_id).nonzero()[:, 0]
    for max_length in (int(images[0]), int(images[2]), int(images[-1])):
        with pytest.raises(MSDDataError, match="an image would be cut off"):
            ConversationEncoder(processor, max_length)(later)
    ConversationEncoder(processor, int(images[-1]) + 1 + (name == "next"))(
        later
    )  # the image's end token must fit as well


@pytest.mark.parametrize("name", ["toy", "next"])
def test_batches_hold_each_sample_as_it_was(name, processors):
    encoder = ConversationEncoder(processors[name])
    tall = Conversation("tall", CHATS["one image"].messages, (GREEN.resize((10, 70)),))
    samples = [encoder(CHATS[chat]) for chat in ("text only", "several images, odd characters")] + [encoder(tall)]
    for index, sample in enumerate(samples):  # as if the processor gave token types
        if index != 1:
            sample["mm_token_type_ids"] = torch.ones_like(sample["input_ids"])
    batch = collate_conversations(samples, pad_token_id=7)
    shape = (3, max(len(sample["input_ids"]) for sample in samples))
    image = 0
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        assert torch.equal(batch["input_ids"][row, :length], sample["input_ids"])
        assert (batch["input_ids"][row, length:] == 7).all()
        assert torch.equal(batch["attention_mask"][row], (torch.arange(shape[1]) < length).long())
        assert torch.equal(batch["assistant_mask"][row, :length], sample["assistant_mask"])
        assert not batch["assistant_mask"][row, length:].any()
        assert batch["mm_token_type_ids"][row].sum() == (0 if row == 1 else length)
        for pixels in sample.get("pixel_values", []):
            found = batch["pixel_values"][image]
            if name == "next":  # patches are padded with zeros
                assert torch.equal(found[: len(pixels)], pixels) and not found[len(pixels) :].any()
            else:
                assert torch.equal(found, pixels)
            image += 1
    assert image == len(batch["pixel_values"]) == 4
    assert all(batch[key].shape == shape for key in ("input_ids", "attention_mask", "assistant_mask"))
    if name == "next":
        assert batch["image_sizes"].shape == (4, 2)
    text = collate_conversations([{k: v for k, v in samples[0].items() if k != "mm_token_type_ids"}], 0)
    assert set(text) - {"token_type_ids"} == {"input_ids", "attention_mask", "assistant_mask"}


def test_images_with_another_number_of_patches_are_padded():
    common = {"input_ids": torch.ones(9, dtype=torch.long), "assistant_mask": torch.ones(9, dtype=torch.bool)}
    few, many = torch.ones(2, 3, 3, 4, 4), torch.ones(1, 5, 3, 4, 4)
    batch = collate_conversations([{**common, "pixel_values": few}, {**common, "pixel_values": many}], 0)
    assert batch["pixel_values"].shape == (3, 5, 3, 4, 4)
    assert batch["pixel_values"].sum() == few.sum() + many.sum() and not batch["pixel_values"][:2, 3:].any()
    # Qwen2-VL concatenates the patches of all images.
    grids = [{"pixel_values": torch.rand(n, 6), "image_grid_thw": torch.tensor([[1, n // 2, 2]])} for n in (4, 8)]
    batch = collate_conversations([{**common, **grid} for grid in grids], 0)
    assert torch.equal(batch["pixel_values"], torch.cat([grid["pixel_values"] for grid in grids]))
    assert batch["image_grid_thw"].tolist() == [[1, 2, 2], [1, 4, 2]]


def test_encoder_leaves_the_processor_alone_and_survives_pickling(toy):
    encoder = ConversationEncoder(toy)
    tokenizer = toy.tokenizer
    sample = encoder(CHATS["one image"])
    assert toy.tokenizer is tokenizer
    again = pickle.loads(pickle.dumps(encoder))
    assert again.fingerprint == encoder.fingerprint
    assert torch.equal(again(CHATS["one image"])["input_ids"], sample["input_ids"])


def test_fingerprint_of_an_encoder_depends_on_all_that_changes_its_result(toy, processors):
    fingerprint = ConversationEncoder(toy).fingerprint
    toy.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)  # leaves traces in the tokenizer
    assert ConversationEncoder(AutoProcessor.from_pretrained(TARGET_DIR)).fingerprint == fingerprint
    assert ConversationEncoder(toy).fingerprint == fingerprint
    resized = copy.deepcopy(toy)
    resized.image_processor.size = resized.image_processor.crop_size = {"height": 48, "width": 48}
    others = [
        ConversationEncoder(toy, 100),
        ConversationEncoder(resized),
        *map(ConversationEncoder, processors.values()),
    ]
    assert len({fingerprint, *(other.fingerprint for other in others)}) == 3 + len(processors) - 1


# Reading


def llava(*turns, **fields):
    """A LLaVA sample in which the turns of user and assistant alternate."""
    names = ("human", "gpt")
    return {"conversations": [{"from": names[i % 2], "value": t} for i, t in enumerate(turns)], **fields}


def load_one(sample, **kwargs):
    return load_conversations([sample], **kwargs)[0]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "deep").mkdir(parents=True)
    RED.save(tmp_path / "images" / "red.png")
    GREEN.save(tmp_path / "images" / "deep" / "green.png")
    return tmp_path / "images"


def test_llava_files_are_read(tmp_path):
    path = write_dataset(tmp_path, "validation", 12, seed=1)
    samples = json.loads(path.read_text())
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\ufeff" + "\n\n".join(map(json.dumps, samples)) + "\n", encoding="utf-8")
    for data in (load_conversations(path), load_conversations(str(lines), image_folder=str(tmp_path))):
        assert len(data) == 12 and data.name in ("validation.json", "lines.jsonl")
        for conversation, sample in zip(data, samples, strict=True):
            assert conversation.id == sample["id"] and conversation.complete
            turns = sample["conversations"]
            assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * (len(turns) // 2)
            assert answers_of(conversation) == [t["value"] for t in turns if t["from"] == "gpt"]
            if "image" in sample:
                question = turns[0]["value"].removeprefix("<image>\n")
                assert conversation.messages[0] == turn("user", None, question)
                assert conversation.images == (tmp_path / sample["image"],)
                (image,) = conversation.open_images()
                assert image.mode == "RGB" and image.size == (144, 144)
            else:
                assert conversation.images == () and conversation.open_images() == []


def test_image_tags_become_parts_where_they_stand(folder):
    sample = llava(
        "<image>\nFirst <image> and\n<image>\nthird",
        "Yes.",
        "Why?",
        "So.",
        "Last?\n<image>",
        "No. ",
        image=["red.png"] * 4,
    )
    conversation = load_one(sample, image_folder=folder)
    assert conversation.messages == [
        turn("user", None, "First ", None, " and", None, "third"),
        turn("assistant", "Yes."),
        turn("user", "Why?"),
        turn("assistant", "So."),
        turn("user", "Last?", None),
        turn("assistant", "No. "),
    ]
    assert conversation.images == (folder / "red.png",) * 4


def test_turns_out_of_order_are_put_right():
    roles = ["system", "gpt", "bing", "human", "user", "chatgpt", "bard", "assistant", "Human ", "gpt", "human"]
    sample = {"conversations": [{"from": role, "value": str(i)} for i, role in enumerate(roles)]}
    assert load_one(sample).messages == [
        turn("system", "0"),
        turn("user", "3\n4"),
        turn("assistant", "5\n6\n7"),
        turn("user", "8"),
        turn("assistant", "9"),
        turn("user", "10"),
    ]
    assert load_one({**llava("a", "b"), "system": "Be brief."}).messages[0] == turn("system", "Be brief.")


def test_ids_and_cut_answers():
    samples = [{**llava("a", "b"), **fields} for fields in ({}, {"id": 7}, {"id": "x"}, {"id": None}, {"id": [1]})]
    data = load_conversations(samples)
    assert [conversation.id for conversation in data] == ["0", "7", "x", "3", "[1]"]
    assert data[-2].id == "3"
    with pytest.raises(IndexError):
        data[5]
    assert not load_one({**llava("a", "b"), "complete": False}).complete


def test_chat_messages_with_images_in_memory(folder):
    buffer = io.BytesIO()
    GREEN.save(buffer, format="PNG")
    stored = {"bytes": buffer.getvalue(), "path": "anything.png"}
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": RED}, {"type": "text", "text": "a"}, {"type": "image"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
        {"role": "user", "content": "<image>\nd"},
        {"role": "assistant", "content": "e"},
    ]
    sample = {"messages": messages, "images": [stored, {"bytes": None, "path": "deep/green.png"}], "image": None}
    conversation = load_one(sample, image_folder=folder)
    assert conversation.messages == [
        turn("user", None, "a", None),
        turn("assistant", "bc"),
        turn("user", None, "d"),
        turn("assistant", "e"),
    ]
    colours = [image.getpixel((0, 0)) for image in conversation.open_images()]
    assert colours == [RED.getpixel((0, 0)), GREEN.getpixel((0, 0)), GREEN.getpixel((0, 0))]


def test_datasets_are_read_without_decoding_images(monkeypatch):
    rows = [
        {"messages": [turn("user", None, "a"), turn("assistant", "b")], "images": [RED]},
        {"messages": [turn("user", "c"), turn("assistant", "d")], "images": []},
    ]
    dataset = datasets.Dataset.from_list(rows)

    def refuse(*args, **kwargs):
        raise AssertionError("an image was decoded")

    again = load_conversations(datasets.Dataset.from_list(rows)).fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(datasets.Image, "decode_example", refuse)
        data = load_conversations(dataset)
        conversations = list(data)
    assert len(data) == 2 and data.fingerprint == again
    assert data.fingerprint != load_conversations(dataset.select([0])).fingerprint
    assert [c.messages for c in conversations] == [row["messages"] for row in rows]
    assert conversations[0].open_images()[0].getpixel((0, 0)) == RED.getpixel((0, 0))
    with pytest.raises(MSDError, match="choose one split"):
        load_conversations(datasets.DatasetDict(train=dataset))


def test_images_are_not_opened_before_they_are_needed(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", refuse)
    data = load_conversations([llava("<image>\na", "b", image="red.png"), {"conversations": 3}], image_folder=folder)
    assert data[0].images == (folder / "red.png",)


def test_fingerprint_of_data_depends_on_its_content(tmp_path):
    samples = [llava("a", "b"), llava("<image>c", "d", image=RED)]
    fingerprint = load_conversations(samples).fingerprint
    assert load_conversations(copy.deepcopy(samples)).fingerprint == fingerprint
    assert load_conversations(samples[::-1]).fingerprint != fingerprint
    assert load_conversations([samples[0], {**samples[1], "image": GREEN}]).fingerprint != fingerprint
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(samples[:1]))
    assert load_conversations(tmp_path / "a.json").fingerprint == load_conversations(tmp_path / "b.json").fingerprint


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.json", None, "cannot be read"),
        ("half.json", b'[{"conversations": ', "is not valid JSON"),
        ("object.json", b'{"a": 1}', "must hold a list of objects"),
        ("numbers.json", b"[1, 2]", "must hold a list of objects"),
        ("latin.json", '["é"]'.encode("latin-1"), "is not UTF-8: line 1"),
        ("deep.json", b"[" * 100_000, "is not valid JSON"),
        ("broken.jsonl", b'{"id": 1}\n{"id"\n', "is not valid JSON"),
        ("lines.txt", b'{"id": 1}\n{"id": 2}\n', r"Name it \.json"),
    ],
)
def test_unreadable_data_is_one_error(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(MSDError, match=message) as error:
        load_conversations(tmp_path / name)
    assert not isinstance(error.value, MSDDataError) and name in str(error.value)


def test_missing_image_folder_is_one_error(tmp_path):
    with pytest.raises(MSDError, match="no image folder"):
        load_conversations([], image_folder=tmp_path / "nothing")


BROKEN_SAMPLES = [
    ("no conversation", {}),
    ("no conversation", {"conversations": []}),
    ("no conversation", {"conversations": "Hi"}),
    ("no conversation", ["Hi"]),
    ("malformed turn", {"conversations": ["Hi"]}),
    ("malformed turn", {"conversations": [{"from": "human"}]}),
    ("malformed turn", {"messages": [{"role": "user", "content": [{"type": "video"}]}]}),
    ("malformed turn", llava("half \ud83d", "a")),
    ("unknown role", {"messages": [{"role": "tool", "content": "Hi"}]}),
    ("unknown role", {"conversations": [{"value": "Hi"}]}),
    ("misplaced system turn", {"messages": [turn("user", "a"), turn("assistant", "b"), turn("system", "c")]}),
    ("empty turn", llava("Hi", " \n")),
    ("empty turn", llava("", "Hi")),
    ("no assistant turn", llava("Hi")),
    ("no assistant turn", {"messages": [turn("assistant", "a"), turn("user", "b")]}),
    ("image count", llava("a", "b", image="red.png")),
    ("image count", llava("<image>\na", "b")),
    ("image count", llava("<image>\na", "b", image=["red.png", "red.png"])),
    ("image count", llava("<image>\na <image>", "b", image="red.png")),
    ("image in answer", llava("a", "<image>\nb", image="red.png", id="[/odd]")),
    ("image outside folder", llava("<image>\na", "b", image="../secret.png")),
    ("image outside folder", llava("<image>\na", "b", image="SECRET")),
    ("image outside folder", llava("<image>\na", "b", image="link.png")),
    ("missing image", llava("<image>\na", "b", image="none.png")),
    ("missing image", llava("<image>\na", "b", image="deep")),
    ("missing image", llava("<image>\na", "b", image="null\0byte.png")),
    ("missing image", llava("<image>\na", "b", image="long" * 2000)),
    ("missing image", llava("<image>\na", "b", image="https://example.org/red.png")),
    ("broken image", llava("<image>\na", "b", image="half.png")),
    ("broken image", llava("<image>\na", "b", image="note.png")),
    ("broken image", llava("<image>\na", "b", image="empty.png")),
    ("broken image", llava("<image>\na", "b", image="chunk.png")),
    ("broken image", llava("<image>\na", "b", image="bomb.png")),
    ("broken image", llava("<image>\na", "b", image={"bytes": b"note", "path": None})),
    ("broken image", llava("<image>\na", "b", image=[3])),
    ("broken image", llava("<image>\na", "b", image="CLOSED")),
    ("broken image", llava("<image>\na", "b", image={"bytes": "text"})),
    ("special token in text", llava("a", "b</s>c")),
    ("special token in text", {"messages": [turn("user", "What is <image>?"), turn("assistant", "b")]}),
    ("too long", llava("a b c d " * 30, "e")),
]


@pytest.fixture
def broken_folder(folder, monkeypatch):
    content = (folder / "red.png").read_bytes()
    (folder.parent / "secret.png").write_bytes(content)
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "half.png").write_bytes(content[: len(content) // 2])
    (folder / "note.png").write_text("not a picture")
    (folder / "empty.png").touch()
    (folder / "chunk.png").write_bytes(content.replace(b"IDAT", b"I\0\0T"))
    Image.new("1", (400, 400)).save(folder / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    return folder


def make_image(sample, folder):
    """Replaces a placeholder in the sample by an image that needs the test's folder."""
    if isinstance(sample, dict) and sample.get("image") == "SECRET":
        return {**sample, "image": str(folder.parent / "secret.png")}
    if isinstance(sample, dict) and sample.get("image") == "CLOSED":
        image = Image.open(folder / "red.png")
        image.fp.close()
        return {**sample, "image": image}
    return sample


@pytest.mark.parametrize("reason, sample", BROKEN_SAMPLES)
def test_broken_samples_give_their_reason(reason, sample, broken_folder, toy):
    sample = make_image(sample, broken_folder)
    if isinstance(sample, dict):
        sample = {**sample, "id": "the one"}
    data = load_conversations([sample], image_folder=broken_folder)
    with pytest.raises(MSDDataError) as error:
        ConversationEncoder(toy, max_length=100)(data[0])
    assert error.value.reason == reason
    assert error.value.sample_id == ("the one" if isinstance(sample, dict) else "0")
    assert str(error.value).startswith("Sample ") and str(error.value).endswith(".")


def test_templates_may_refuse_a_sample(processors):
    strict = copy.copy(processors["chatml"])
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + CHATML_TEMPLATE
    )
    with pytest.raises(MSDDataError, match="System role not supported") as error:
        ConversationEncoder(strict)(Conversation("s", [turn("system", "x"), *CHATS["text only"].messages]))
    assert error.value.reason == "refused by chat template"
    strict.chat_template = CHATML_TEMPLATE.replace("part['text'] }}", "part['text'] | replace('Yes', 'No') }}")
    with pytest.raises(MSDDataError, match="hides where an answer begins"):
        ConversationEncoder(strict)(CHATS["text only"])


def test_processors_may_refuse_an_image(processors):
    narrow = Conversation("narrow", CHATS["one image"].messages, (RED.resize((2000, 4)),))
    with pytest.raises(MSDDataError, match="aspect ratio") as error:
        ConversationEncoder(processors["qwen"])(narrow)
    assert error.value.reason == "refused by processor" and error.value.sample_id == "narrow"


def test_every_reason_is_tested_here():
    elsewhere = {
        "unexpected error",
        "non-finite features",
        "image for a text-only target",
        "refused by chat template",
        "refused by processor",
        "tokenization",
    }
    assert {reason for reason, _ in BROKEN_SAMPLES} | elsewhere == set(REASONS)


# The check of a data set


@pytest.fixture
def checked_data(broken_folder):
    good = [
        llava("<image>\nWhat is this?", "It is [bold]red[/bold].", image="red.png", id="visual"),
        llava("Hello", "Hello é😀.", "And?", "So. " * 40, id="text"),
    ]
    bad = [make_image(sample, broken_folder) for _, sample in BROKEN_SAMPLES]
    return load_conversations([*bad[:20], *good, *bad[20:]], image_folder=broken_folder)


def test_check_counts_usable_samples_and_reasons(checked_data, toy):
    report = check_conversations(checked_data, toy, max_length=100, num_shown=2)
    expected = [reason for reason, _ in BROKEN_SAMPLES]
    assert dict(report.reasons) == {reason: expected.count(reason) for reason in expected}
    assert all(len(report.examples[reason]) == min(3, expected.count(reason)) for reason in expected)
    assert (report.num_samples, report.num_ok) == (len(expected) + 2, 2)
    samples = [ConversationEncoder(toy, 100)(checked_data[index]) for index in (20, 21)]
    assert report.lengths == [len(sample["input_ids"]) for sample in samples] and report.lengths[1] == 100
    assert report.num_trained_tokens == sum(int(sample["assistant_mask"].sum()) for sample in samples)
    assert report.num_tokens == sum(report.lengths)
    assert (report.num_with_images, report.num_images) == (1, 1)
    assert [shown.id for shown in report.shown] == ["text", "visual"]
    assert report.shown[1].pieces == [
        ("<s>USER: <image>x36\nWhat is this? ASSISTANT:", False),
        (" It is [bold]red[/bold].</s>", True),
    ]
    assert report.shown[0].pieces[1] == (" Hello é😀.</s>", True)

    with pytest.raises(MSDDataError):
        check_conversations(checked_data, toy, strict=True)


def test_report_is_printed_with_colours_and_without(checked_data, toy):
    report = check_conversations(checked_data, toy, max_length=100)
    for coloured in (False, True):
        console = Console(
            file=io.StringIO(), force_terminal=coloured, width=200, color_system="standard", highlight=False
        )
        render_report(report, console)
        text = console.file.getvalue()
        assert "Sample '[/odd]': there is an image" in text
        assert f"2 of {len(BROKEN_SAMPLES) + 2} samples can be used" in text
        for reason in report.reasons:
            assert reason in text
        answer = " It is [bold]red[/bold].</s>"  # not taken for markup of the terminal
        assert (f"\x1b[1;32m{answer}\x1b[0m" if coloured else f"ASSISTANT:‹{answer}›") in text
        assert "<image>x36" in text


def test_check_of_data_without_one_good_sample(toy):
    report = check_conversations(load_conversations([{}]), toy)
    console = Console(file=io.StringIO(), width=200)
    render_report(report, console)
    assert "0 of 1 samples can be used" in console.file.getvalue() and report.shown == []
