"""The functions of the task `toy_world`: what is shown, what is asked, and how an answer is scored."""


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    words = lmms_eval_specific_kwargs or {}
    return doc["question"] + words.get("post_prompt", "")


def process_results(doc, results):
    """Scores an answer by the facts that a correct answer contains."""
    found = [fact in results[0] for fact in doc["facts"]]
    return {"all_facts": float(all(found)), "share_of_facts": sum(found) / len(found)}
