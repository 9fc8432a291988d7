"""
Chat with a vision-language model and a draft. All turns share one KV cache, so that each turn reads only new tokens.

    python examples/chat.py --image msd_hf/toy/demo.png

    python examples/chat.py --say "Count from 3 to 9." "Which number comes first?"
"""

import sys
from dataclasses import dataclass, field

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, TextStreamer

from msd_hf import MSDDraftModel
from msd_hf.compat import CACHE_NAME
from msd_hf.toy import DRAFT_DIR, TARGET_DIR


@dataclass
class ScriptArguments:
    target: str = str(TARGET_DIR)
    draft: str = str(DRAFT_DIR)
    image: str | None = field(default=None, metadata={"help": "Shown with the first question."})
    say: list[str] = field(
        default_factory=list, metadata={"help": "Questions; by default they are read from the terminal."}
    )
    max_new_tokens: int = 200
    dtype: str = "auto"
    device_map: str | None = None


if __name__ == "__main__":
    args = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()[0]
    processor = AutoProcessor.from_pretrained(args.target)
    target = AutoModelForImageTextToText.from_pretrained(args.target, dtype=args.dtype, device_map=args.device_map)
    draft = MSDDraftModel.from_pretrained(args.draft, dtype=target.dtype).to(target.device)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    image = None if args.image is None else Image.open(args.image)
    chat, known, output = [], "", None
    if not args.say:
        print("Ask a question a line (--image shows a picture with the first one); Ctrl-D ends.", file=sys.stderr)
    for question in args.say or (line.strip() for line in sys.stdin if line.strip()):
        content = [{"type": "image"}] * (image is not None and not chat) + [{"type": "text", "text": question}]
        chat.append({"role": "user", "content": content})
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        new = {"text": text.removeprefix(known), "add_special_tokens": False, "return_tensors": "pt"}
        inputs = processor(images=None if chat[1:] else image, **new).to(target.device, target.dtype)
        if output is not None:  # continue after the generated tokens, which need not be encoded again
            ids = torch.cat([output.sequences, inputs["input_ids"]], dim=1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE_NAME: output[CACHE_NAME]}
        options = {"max_new_tokens": args.max_new_tokens, "streamer": streamer, "return_dict_in_generate": True}
        output = target.generate(**inputs, assistant_model=draft, **options)
        answer = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]})
        known = processor.apply_chat_template(chat)
