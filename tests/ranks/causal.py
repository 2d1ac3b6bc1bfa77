"""Tiny causal language models of transformers, from configs, and their training in two ways."""

import os

import torch
from torch.nn.functional import cross_entropy

import dtrain
from dtrain.callbacks import ClipGradients, GradientAccumulation, LRSchedule
from dtrain.strategies import FSDP

VOCABULARY, LENGTH, SAMPLES, BATCH, EPOCHS, WARMUP = 31, 9, 20, 4, 2, 3
STEPS = SAMPLES // BATCH * EPOCHS
LR, BETAS, EPS, DECAY, MAX_NORM = 1e-2, (0.9, 0.95), 1e-6, 0.1, 0.5


def loss_in_float64(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
    """Is transformers' own, but for its cast to float32."""
    kind = "mean" if num_items_in_batch is None else "sum"
    targets = labels[:, 1:].reshape(-1)
    loss = cross_entropy(logits[:, :-1].reshape(-1, vocab_size), targets, reduction=kind)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def make(kind, *, exact=True):
    """Returns a model in float64, in train mode: "llama", "gpt2" (tied), or "lora"."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    if kind == "gpt2":
        sizes = {"n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 16}
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        ids = {"bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **ids))
    else:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
        )
        model = LlamaForCausalLM(config)
        for name, module in [*model.named_modules()]:
            if exact and type(module).__name__ == "LlamaRMSNorm":  # computes in float32
                norm = torch.nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
                model.set_submodule(name, norm)
    model = model.double()
    model.loss_type = "ForCausalLM"  # which transformers.Trainer counts tokens by
    if exact:
        model.loss_function = loss_in_float64
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
        model = model.double()  # adapters come in float32
    return model


def dataset(*, ragged=False):
    """Rows of tokens; if ragged, padded ones of 3 to 9."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for number in range(SAMPLES):
        ids = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        pads = torch.arange(LENGTH) >= (3 + number * 5 % 7 if ragged else LENGTH)
        labels = ids.masked_fill(pads, -100)
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": (~pads).long()})
    return rows


def adamw(model):
    """Is what transformers.Trainer makes: no decay of biases and norms."""
    from transformers import Trainer

    decays = {*Trainer.get_decay_parameter_names(None, model)}
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if n in decays], "weight_decay": DECAY},
        {"params": [p for n, p in trained if n not in decays], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)


def loss_fn(model, batch):
    return model(**batch).loss


def loss_by_tokens(model, batch):
    return dtrain.Loss(model(**batch).loss, weight=(batch["labels"][:, 1:] != -100).sum())


class Losses(dtrain.Callback):
    def __init__(self):
        self.losses = []

    def on_step_end(self, ctx, step):
        self.losses.append(step.loss_mean)


def schedule(optimizer, steps):
    from transformers import get_linear_schedule_with_warmup

    return get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)


def trainer(strategy, model, *, ragged=False, micros=1, callbacks=(), scheduled=True, **more):
    every = [Losses(), ClipGradients(MAX_NORM), *callbacks]
    every += [LRSchedule(schedule)] if scheduled else []
    every += [GradientAccumulation(micros)] if micros > 1 else []
    return dtrain.Trainer(
        model,
        adamw,
        loss_by_tokens if ragged else loss_fn,
        callbacks=every,
        sinks=[],
        strategy=FSDP() if strategy == "fsdp" else strategy,
        hang_after_s=20.0,
        **more,
    )


def whole(model):
    """Returns the parameters by name. Ranks: all, communicates."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    return {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p.clone()) for n, p in named.items()
    }


def by_transformers(model, folder, *, ragged=False, micros=1):
    """Trains by transformers.Trainer, in this process; returns losses and weights."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    from transformers import Trainer, TrainingArguments

    losses = []

    class Noting(Trainer):
        def training_step(self, *args, **kwargs):
            losses.append(super().training_step(*args, **kwargs).item())
            return torch.tensor(losses[-1])

    Noting(
        model,
        TrainingArguments(
            str(folder),
            per_device_train_batch_size=BATCH // micros,
            gradient_accumulation_steps=micros,
            num_train_epochs=EPOCHS,
            train_sampling_strategy="sequential",
            learning_rate=LR,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            weight_decay=DECAY,
            max_grad_norm=MAX_NORM,
            lr_scheduler_type="linear",
            warmup_steps=WARMUP,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=dataset(ragged=ragged),
    ).train()
    steps = [sum(losses[i : i + micros]) for i in range(0, len(losses), micros)]
    return steps, whole(model)
