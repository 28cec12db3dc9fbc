"""Tables, figures and the page about runs.

- ``run_data``: what a run directory holds; ``published``: scores and curves of others
- ``statistics``: means and intervals over seeds, smoothing (the bootstrap is in :mod:`wn_rl.evaluation.statistics`)
- ``score_tables``: the scores of ``evaluate.py`` on the terminal, as JSON and as CSV
- ``run_tables``: the rows of the report's tables, and its CSV files
- ``learning_curves``: what is drawn over frames; ``figures``: how it is drawn
- ``page``: the HTML; ``report_directory``: the page with its files, written to disk
- ``experiment_grid``, ``reproduction_tables``, ``reproduction``: docs/reproduction.md
"""
