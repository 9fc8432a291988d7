"""The way to the Hub and back: which target a draft is for, which drafts fit a target, cards, publishing."""
