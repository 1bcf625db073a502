from .kernels.checks import check_fold_in, check_normal, check_raw_words, check_run_keys, check_step
