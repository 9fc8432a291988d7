"""The page of `msd-hf demo --web`: the target alone and with its draft, side by side. Importing it needs no gradio."""
