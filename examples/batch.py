"""
Answer several questions in one call, each about a picture or about none. The default is the bundled toy pair.

    python examples/batch.py

    python examples/batch.py \
        --target llava-hf/llava-1.5-7b-hf --draft lucylyn/MSD-LLaVA1.5-7B --dtype float16 --device_map cuda \
        --questions "What is this?" "Which colour is the car?" "Say hello." --images cat.jpg car.jpg none
"""

from dataclasses import dataclass, field

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

from msd_hf import MSDDraftModel
from msd_hf.toy import DEMO_IMAGE, DRAFT_DIR, TARGET_DIR


@dataclass
class ScriptArguments:
    target: str = str(TARGET_DIR)
    draft: str = str(DRAFT_DIR)
    questions: list[str] = field(
        default_factory=lambda: ["What is in the picture?", "How many objects are there?", "Count from 3 to 9."]
    )
    images: list[str] = field(default_factory=lambda: [str(DEMO_IMAGE), str(DEMO_IMAGE), "none"])
    max_new_tokens: int = 200
    dtype: str = "auto"
    device_map: str | None = None


if __name__ == "__main__":
    args = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()[0]

    # Target and draft. Padding is on the left, so that all prompts of the batch end at the same position
    processor = AutoProcessor.from_pretrained(args.target, padding_side="left")
    target = AutoModelForImageTextToText.from_pretrained(args.target, dtype=args.dtype, device_map=args.device_map)
    draft = MSDDraftModel.from_pretrained(args.draft, dtype=target.dtype).to(target.device)

    # Prompts
    texts = []
    for question, image in zip(args.questions, args.images, strict=True):
        content = [{"type": "image"}] * (image != "none") + [{"type": "text", "text": question}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    images = [Image.open(image) for image in args.images if image != "none"]
    inputs = processor(images=images or None, text=texts, padding=True, add_special_tokens=False, return_tensors="pt")
    inputs = inputs.to(target.device, target.dtype)

    # Generation: each row accepts its own number of tokens in a round, and costs nothing after its end
    output = target.generate(
        **inputs, assistant_model=draft, max_new_tokens=args.max_new_tokens, return_dict_in_generate=True
    )
    answers = processor.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for question, answer, lengths in zip(args.questions, answers, output.acceptance_lengths, strict=True):
        print(f"{question}\n{answer.strip()}\n({1 + sum(lengths)} tokens in {1 + len(lengths)} forwards)\n")
