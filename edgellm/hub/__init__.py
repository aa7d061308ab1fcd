"""The Hugging Face Hub, through ``huggingface_hub``: fetching, what is cached, and publishing.

``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` count as in every other program.
"""
