"""How Qwen2-Audio, Voxtral and Audio Flamingo 3 are named on the Hub, and by the classes of transformers 5."""

from lalm_lens.weights import Layout

PUBLISHED = Layout(
    (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("audio_tower.", "model.audio_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    )
)
TRANSFORMERS_5 = Layout()
