"""Prompt lookup (apoorvumang/prompt-lookup-decoding; transformers' ``prompt_lookup_num_tokens``).

``index`` finds earlier occurrences of the text's last tokens, ``drafter`` is the method.
"""

from specdec.drafters.prompt_lookup.drafter import PromptLookup as PromptLookup
