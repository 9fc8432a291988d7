"""
Ask a vision-language model with a draft about a picture. The default is the bundled toy pair and its demo picture.

    python examples/generate_image.py

    python examples/generate_image.py \
        --target llava-hf/llava-1.5-7b-hf --draft lucylyn/MSD-LLaVA1.5-7B --dtype float16 --device_map cuda \
        --image photo.jpg --question "What is in the picture?"
"""

from dataclasses import dataclass

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, TextStreamer

from msd_hf import MSDDraftModel
from msd_hf.toy import DEMO_IMAGE, DRAFT_DIR, TARGET_DIR


@dataclass
class ScriptArguments:
    target: str = str(TARGET_DIR)
    draft: str = str(DRAFT_DIR)
    image: str = str(DEMO_IMAGE)
    question: str = "What is in the picture?"
    max_new_tokens: int = 200
    dtype: str = "auto"
    device_map: str | None = None


if __name__ == "__main__":
    args = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()[0]

    # Target and draft
    processor = AutoProcessor.from_pretrained(args.target)
    target = AutoModelForImageTextToText.from_pretrained(args.target, dtype=args.dtype, device_map=args.device_map)
    draft = MSDDraftModel.from_pretrained(args.draft, dtype=target.dtype).to(target.device)

    # Prompt
    content = [{"type": "image"}, {"type": "text", "text": args.question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.open(args.image), text=text, add_special_tokens=False, return_tensors="pt")
    inputs = inputs.to(target.device, target.dtype)

    # Generation: the tokens equal those of the target alone, and are streamed as they are accepted
    output = target.generate(
        **inputs,
        assistant_model=draft,
        max_new_tokens=args.max_new_tokens,
        streamer=TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
        return_dict_in_generate=True,
    )
    lengths = output.acceptance_lengths[0]
    print(f"{1 + sum(lengths)} tokens in {1 + len(lengths)} forwards of the target")
