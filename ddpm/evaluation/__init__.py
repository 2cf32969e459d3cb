"""Evaluation of trained nets, and comparison of runs.

In the order in which to read it:

    settings         what ddpm evaluate takes
    evaluate         checkpoints -> results, in pieces on any number of workers
    inputs           what that reads: checkpoints, data, features of real images
    bits_per_dim     the bound of held-out images; rung: the same, measured by the loop for a search
    features         what a feature net is, and the cache; nets, classifier, inception: those there are
    metrics          FID, KID, precision, recall; jackknife: their standard errors
    feature_scores   all of these with one feature net, beside real images against real images
    memorisation     the share of generated images that are near training images
    results_table    what was found (ddpm.runs.evaluations) on the terminal; save_results: in files and MLflow

    ranking          ranks with ties
    compared_run     a run as its folder tells of it
    comparison       which run is better; comparison_page: that, samples, settings and curves as HTML; plots: curves
"""
