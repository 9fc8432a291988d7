"""
Train a draft for a LLaVA-like model in two stages: text first, then more and more images.

    python -m msd_hf.toy.training_data --output toy-data --samples 400

    python examples/train_two_stage.py \
        --target msd_hf/toy/pair/target \
        --text_data toy-data/text.json --visual_data toy-data/visual.json --image_folder toy-data \
        --output_dir my-draft --recipe recommended --max_steps 100

    accelerate launch --config_file examples/configs/ddp.yaml examples/train_two_stage.py ...
"""

from dataclasses import dataclass

from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

from msd_hf.training import MSDTrainer, MSDTrainingArguments, load_conversations


@dataclass
class ScriptArguments:
    target: str
    text_data: str
    visual_data: str
    image_folder: str
    eval_data: str | None = None


if __name__ == "__main__":
    parser = HfArgumentParser((ScriptArguments, MSDTrainingArguments))
    script_args, training_args = parser.parse_args_into_dataclasses()

    # Target and processor
    target = AutoModelForImageTextToText.from_pretrained(script_args.target)
    processor = AutoProcessor.from_pretrained(script_args.target)

    # Data
    text_dataset = load_conversations(script_args.text_data)
    visual_dataset = load_conversations(script_args.visual_data, image_folder=script_args.image_folder)
    eval_dataset = None
    if script_args.eval_data is not None:
        eval_dataset = load_conversations(script_args.eval_data, image_folder=script_args.image_folder)

    # Training: without a `model` the trainer makes a new draft for the target
    trainer = MSDTrainer(
        target=target,
        args=training_args,
        processing_class=processor,
        text_dataset=text_dataset,
        visual_dataset=visual_dataset,
        eval_dataset=eval_dataset,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    # The draft is in the output folder. Push it to the Hub
    if training_args.push_to_hub:
        trainer.push_to_hub()
