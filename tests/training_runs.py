"""A small random LLaVA with the toy world's processor, and trainers for it."""

from transformers import LlavaForConditionalGeneration, set_seed

from msd_hf.toy.target import build_target_config
from msd_hf.training import MSDTrainer, MSDTrainingArguments


NUM_SAMPLES = 24


def build_small_target(processor, seed=0):
    """A LLaVA with two decoder layers, in float32."""
    config = build_target_config(processor, num_layers=2)
    config.text_config.hidden_size = config.text_config.intermediate_size = 64
    config.text_config.head_dim = 16
    config.vision_config.num_hidden_layers = 1
    set_seed(seed)
    target = LlavaForConditionalGeneration(config).eval()
    target.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    target.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return target


def make_trainer(target, processor, data, output_dir, eval_dataset=None, callbacks=None, model=None, **arguments):
    fields = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "max_length": 512,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "eval_max_new_tokens": 12,
        "seed": 0,
    }
    return MSDTrainer(
        model=model,
        target=target,
        processing_class=processor,
        args=MSDTrainingArguments(output_dir=str(output_dir), **{**fields, **arguments}),
        text_dataset=data["text"],
        visual_dataset=data["visual"],
        eval_dataset=eval_dataset,
        callbacks=callbacks,
    )


def log_history(trainer):
    """The log entries of training steps, without those of evaluations."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]
