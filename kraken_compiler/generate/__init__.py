"""Generating text with a compiled model: requests, the loop, tokenizers and chats."""
