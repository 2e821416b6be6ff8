"""CLIP as a classifier: images against the prompts of the classes, called like any classification model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPModel
from transformers.modeling_outputs import ImageClassifierOutput


class PromptedCLIP(CLIPModel):  # type: ignore[misc]  # transformers has too few types
    """A `transformers.CLIPModel` whose texts are fixed: a prompt a class.

    The texts are encoded in every forward pass, because what is trained may be in the text encoder too. They
    are buffers of the model and no part of a batch, so that a batch can be cut into examples. What is saved
    is a plain CLIP.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor

    def prompted(self, input_ids: Tensor, attention_mask: Tensor) -> PromptedCLIP:
        """The model itself with tokenised prompts ``(classes, length)``, padded on the right."""
        self.register_buffer("prompt_ids", input_ids, persistent=False)
        self.register_buffer("prompt_mask", attention_mask, persistent=False)
        return self

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Logits ``exp(logit_scale) · cos(image, prompt)`` ``(N, classes)``; with labels, their mean loss.

        Args:
            pixel_values: ``(N, channels, height, width)``.
            labels: class numbers ``(N,)``.
        """
        found = super().forward(
            input_ids=self.prompt_ids, attention_mask=self.prompt_mask, pixel_values=pixel_values
        )
        # a scale of 100 makes bfloat16's last bit of a cosine an eighth of a logit: the product is not in it
        dtype = torch.promote_types(found.image_embeds.dtype, torch.float32)
        with torch.autocast(pixel_values.device.type, enabled=False):
            cosines = found.image_embeds.to(dtype) @ found.text_embeds.to(dtype).T
            logits = self.logit_scale.to(dtype).exp() * cosines
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
