"""Programs that measure thalweg from Python, beside what else Python has.

::

    python -m thalweg.bench pingpong --backend thalweg,asyncio,tornado --size 8,64KiB --repeat 9
    python -m thalweg.bench bandwidth --backend thalweg,tornado --size 10MB --repeat 9
    python -m thalweg.bench dask --protocol thalweg,tcp --repeat 3 --plot dask.png

``pingpong`` and ``bandwidth`` start two processes for every sample, each on a core of its own.
Every repetition takes all backends in turn, and medians over the repetitions are reported. Every
byte of the messages before the measurement is verified, and every byte of its last one. All have
the same settings of malloc: without them asyncio's streams have two speeds, and chance decides
which. UCXX, which works in threads of its own, is not bound to a core. The other backends are used
as their documentation shows, with the sockets' own settings.

Between two machines the listener needs no further options::

    host-b$ python -m thalweg.bench pingpong --listen thalweg://0.0.0.0:7000
    host-a$ python -m thalweg.bench pingpong --connect thalweg://host-b:7000 --size 8,1MiB

The ``THALWEG_*`` variables are honoured on both sides, each on its own machine. Each sample has a
further port of the system's choice, which firewalls between the two have to let through. The
listener believes whoever connects: do not leave it running on an open network.

``dask`` starts a scheduler and workers, one process each, for every protocol in turn, and takes the
times that a client sees; of the large transfer also the time that Dask's own log of transfers has.
Results are verified. ``--profile`` says where that time goes: how much CPU
scheduler, workers and client spend in the comms (those of thalweg, or of ``tcp``), in serialising, in
the rest of their event loops and in other threads, and how long Dask's batched streams hold messages
back. It counts the repetitions that are timed, and is the same for every protocol.
"""
