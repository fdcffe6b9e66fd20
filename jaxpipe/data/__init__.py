"""Text to tokens to batches.

    files        what a file holds, by its content
    tokenizer    a model's own tokenizer, or bytes; `vocab_files` and `sentence_piece` where there is no
                 tokenizer.json; `chat` its template; `runs` and `panics` what decoders and libraries do
    corpus       where tokens come from
    batches      which tokens make up which batch: a function of one integer
    fingerprint  whether the data are the same as before

Read `corpus` and `batches` first.
"""
