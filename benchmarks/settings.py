"""The tables of the documents: what is run for each, as overrides of the package's command line.

In overrides, ``{seed}`` is the run's seed, ``{data}`` and ``{parents}`` are the options of those names,
``{weights:NAME}`` is the file of a model's weights, ``{weights:NAME+NAME}`` a file with those of two networks,
and ``{first:T+V}`` the dataset with the first T train and V val images of each class.
"""

from __future__ import annotations

from typing import NamedTuple

from iciia_exp.tasks import CLICK, QUALITY, SINGLE_LABEL, Task

SEEDS = (0, 1, 2)

#: Of the gain over clients, in percent.
QUANTILES = tuple(range(0, 101, 5))

#: Methods that are trained on labelled images of the test clients.
OWN_LABELS = ("finetune", "prompt_tuning")


class Table(NamedTuple):
    """A table of the documents.

    Attributes:
        page: the page with its main part.
        minutes: duration on two CPU cores, roughly.
        common: overrides of every run.
        settings: overrides of each setting, by its label.
        columns: figures that are stored beside the usual ones, by their keys in ``results.json``.
        reference: the setting that others are compared with, paired over the seeds; empty: the backbone alone.
        bounds: settings that break the premise; they are not compared with others.
        task: names the figures.
        script: what makes the table, in the place of runs; of a benchmark of speed, what it prints is the table.
        clients: whether quantiles of the gain over clients and calibration are stored.
    """

    page: str
    minutes: int
    common: str
    settings: dict[str, str]
    columns: tuple[str, ...] = ()
    reference: str = ""
    bounds: tuple[str, ...] = ()
    task: Task = SINGLE_LABEL
    script: str = ""
    clients: bool = False

    @property
    def measured(self) -> bool:
        """Whether it is what a benchmark of speed prints."""
        return self.script.startswith("bench_")


def crossed(key: str, values: tuple[object, ...], ways: dict[str, str]) -> dict[str, str]:
    """Return settings of every value of a key and every way, value first in the label."""
    return {f"{value} {label}": f"{key}={value} {way}" for value in values for label, way in ways.items()}


def swept(key: str, values: tuple[object, ...], ways: dict[str, str]) -> dict[str, str]:
    """Return settings of every way and every value of a key, way first in the label."""
    return {f"{label} {value}": f"{key}={value} {way}" for label, way in ways.items() for value in values}


def named(method: str, *settings: str, more: str = "") -> dict[str, str]:
    """Return settings of a method, labelled by its keys; ``""`` is the method as it is."""
    return {
        " ".join(filter(None, (method, keys))): " ".join(
            [f"method={method}", *(f"method.{key}" for key in keys.split()), more]
        )
        for keys in settings
    }


# ---- clients whose images adapt a method

STREAMING = "training=streaming client_mix=all_types"

#: Methods that are compared everywhere; the recommended one first.
METHODS = {
    name: f"method={name}"
    for name in (
        *("client_profile", "iciia_prior", "iciia_stream", "iciia", "arm_cml", "context_token", "feedforward"),
        *("linear_head", "conv_across_images", "client_types", "client_prior", "prior_em", "prior_map"),
        *("smoothed_prior", "lame", "t3a", "stata", "oracle_classes"),
    )
}
METHODS |= {name: f"{METHODS[name]} {STREAMING}" for name in ("iciia_prior", "iciia_stream")}
TUNED = {name: f"method={name}" for name in OWN_LABELS}


def of(*names: str) -> dict[str, str]:
    """Return some of the methods."""
    return {name: METHODS[name] for name in names}


#: The recommended method without client vector, without changes, and with more; and `iciia_prior` on the partition.
PARTS_OF_PROFILE = {
    **named("client_profile", "vector=0", "change=0", "change=0.05"),
    "iciia_prior natural": "method=iciia_prior training=streaming",
}
#: Ways to serve a client's images one after the other; those in `METHODS` are its runs.
STREAMS = {
    "iciia, training=published": "method=iciia training=published",
    **of("iciia", "iciia_stream", "iciia_prior", "client_prior"),
    "client_prior, iid_bonus=0": "method=client_prior method.prior.iid_bonus=0",
    **of("client_profile"),
}
#: By the severity of the shift.
SHIFTS = of(
    "client_profile", "iciia_prior", "client_prior", "client_types", "iciia_stream", "iciia", "prior_em", "lame"
)

#: Clients of other types, drawn from the test images; and accuracy over all images of a client alone.
DRAWN = "evaluation.drawn_clients=500"
ALONE = "evaluation.history_lengths=[]"
ALL_SEEDS = "partition.seed={seed} backbone.seed={seed} seed={seed}"
DIGITS = f"groups=16 {ALL_SEEDS}"
TINY = (
    "+experiment=mobilenetv2_tiny_imagenet data_dir={data} dataset.parents={parents} backbone.train=head "
    "backbone.model.mean=[0.5,0.5,0.5] backbone.model.std=[0.5,0.5,0.5] partition.seed={seed} seed={seed} "
    "name=tiny_imagenet"
)
#: The same with the classifier of the weights, as in the paper.
TINY_OWN = TINY.replace(" backbone.train=head", "")
MOBILENET = "backbone.weights={weights:mobilenetv2_100} backbone.model.options={{pad_type:same}}"
LITE = (
    "backbone.name=efficientnet_lite{n} backbone.model.model=tf_efficientnet_lite{n} "
    "backbone.weights={{weights:tf_efficientnet_lite{n}}}"
)
BACKBONES = {"MobileNetV2": MOBILENET, "EfficientNet-lite0": LITE.format(n=0), "EfficientNet-lite2": LITE.format(n=2)}
#: Behind MobileNetV2, with two layers in small groups.
TINY_SMALL = f"{TINY} {MOBILENET} num_layers=2 groups=256"
#: Behind each backbone; ICIIA-B behind `BASE` alone, whose runs take half an hour, ten times those of ICIIA-T.
BEHIND = (
    of("client_profile")
    | {"ICIIA-B": "method=iciia num_layers=3 groups=1 optimizer.lr=1e-4"}
    | {"ICIIA-T": "method=iciia num_layers=3 groups=256"}
    | of("client_types")
    | TUNED
)
BASE = "MobileNetV2 128"
OMNIGLOT = f"+experiment=omniglot data_dir={{data}} {ALL_SEEDS} dataset.seed={{seed}}"
MNIST = "data_dir={data} dataset.num_classes=10"

TABLES = {
    "digits": Table("rivals.md", 40, f"name=digits {DIGITS} {DRAWN}", METHODS | PARTS_OF_PROFILE),
    "groups": Table(
        "results.md",
        30,
        f"name=digits {ALL_SEEDS} {ALONE}",
        of("linear_head")
        | {f"iciia groups={groups}": f"method=iciia groups={groups}" for groups in (512, 64, 16, 4, 1)},
    ),
    "layers": Table(
        "benchmarks.md",
        40,
        f"name=digits {ALL_SEEDS} {ALONE}",
        swept(
            "groups",
            (1, 4, 16, 64, 256, 512),
            {f"N={layers}": f"method=iciia num_layers={layers}" for layers in (1, 2, 3)},
        ),
    ),
    "training": Table(
        "benchmarks.md",
        90,
        f"{TINY_SMALL} method=iciia {ALONE}",
        {
            "published": "training=published",
            "default": "",
            "default training.shuffle_images=false": "training.shuffle_images=false",
            "default training.recipe.batch_size=1": "training.recipe.batch_size=1",
        },
        reference="default",
    ),
    "severity": Table(
        "rivals.md",
        60,
        f"name=digits_severity {DIGITS} {ALONE}",
        crossed("partition.classes_per_client", (2, 3, 5, 10), SHIFTS),
    ),
    "dirichlet": Table(
        "rivals.md",
        60,
        f"name=digits_dirichlet partition=dirichlet {DIGITS} {ALONE}",
        crossed("partition.alpha", (0.1, 0.3, 1, 10), SHIFTS),
    ),
    "own_classifier": Table(
        "results.md",
        40,
        f"{TINY_OWN} {MOBILENET} num_layers=1 groups=256 {ALONE}",
        of("linear_head", "iciia", "client_types", "client_profile"),
    ),
    "omniglot_drawer": Table("rivals.md", 20, f"{OMNIGLOT} name=omniglot_drawer {DRAWN}", METHODS | PARTS_OF_PROFILE),
    "omniglot_alphabet": Table(
        "rivals.md",
        20,
        f"{OMNIGLOT} name=omniglot_alphabet partition=parent_category {DRAWN}",
        METHODS | PARTS_OF_PROFILE,
    ),
    "mnist_writers": Table(
        "rivals.md",
        90,
        f"+experiment=cnn_femnist {MNIST} backbone.reserve=0.1 backbone.recipe.epochs=10 "
        f"training=default training.recipe.epochs=10 groups=256 name=mnist_writers {ALL_SEEDS} {DRAWN}",
        METHODS,
    ),
    "tiny_imagenet": Table("rivals.md", 120, f"{TINY_SMALL} {DRAWN}", METHODS | TUNED),
    "clients": Table(
        "client_profile.md",
        60,
        f"{TINY_SMALL} {ALONE}",
        of("client_profile", "iciia"),
        clients=True,
    ),
    "streams": Table("streams.md", 60, f"{TINY_SMALL} {DRAWN}", STREAMS),
    "streams_digits": Table(
        "streams.md",
        10,
        f"name=digits {DIGITS} {DRAWN}",
        {
            "iciia": "method=iciia",
            "iciia_stream": "method=iciia_stream training=streaming",
            "iciia_stream, perceptron=0": "method=iciia_stream method.image.perceptron=0 training=streaming",
            "iciia_prior": "method=iciia_prior training=streaming",
            "iciia_prior, iid_bonus=0": "method=iciia_prior method.prior.iid_bonus=0 training=streaming",
        },
    ),
    "held_out": Table(
        "rivals.md",
        120,
        f"{TINY_SMALL} client_mix.unseen_types=0.33 name=tiny_held_out",
        of("client_profile", "client_prior", "prior_em", "lame", "client_types", "iciia"),
    ),
    "backbones": Table(
        "results.md",
        300,
        f"{TINY} {ALONE}",
        {
            f"{name} {pixels} {label}": f"{backbone} backbone.model.image_size={pixels} {way}"
            for name, backbone in BACKBONES.items()
            for pixels in (128, 224)
            for label, way in BEHIND.items()
            if label != "ICIIA-B" or f"{name} {pixels}" == BASE
        },
    ),
    "heterogeneity": Table(
        "rivals.md",
        120,
        f"{TINY_OWN} {MOBILENET} partition=reserve_ratio num_layers=2 groups=256 {ALONE}",
        crossed(
            "partition.ratio", (0, 0.25, 0.5, 0.75, 1), of("client_profile", "client_types", "iciia", "linear_head")
        ),
    ),
}

# ---- devices that learn on tokens of the cloud's backbone

TUNING = ("request_down_bytes", "request_device_macs", "parameters", "training_bytes")
MIET = "+experiment=miet_tiny_imagenet data_dir={first:30+20}"
MIET_TINY = f"{MIET} partition.seed={{seed}} seed={{seed}}"
VIT = "backbone.weights={weights:vit_small_patch14_dinov2}"
LITE0_TOKENS = (
    "backbone.model.model=tf_efficientnet_lite0 backbone.model.image_size=128 name=miet_lite0 "
    "backbone.weights={weights:tf_efficientnet_lite0}"
)
LONG, SHORT = "method.epochs=40 method.patience=10", "method.epochs=20 method.patience=5"

TABLES |= {
    "miet_tiny_imagenet": Table(
        "miet.md",
        60,
        f"{MIET_TINY} {VIT}",
        {
            "linear_probe": f"method=linear_probe {LONG}",
            **named("miet", "blocks=0", "blocks=1", more=LONG),
            **named("last", "", "blocks=4", more=SHORT),
            **named("side_network", "blocks=4", more=SHORT),
            "last_block": "method=last_block method.epochs=10 method.patience=4",
        },
        TUNING,
        "linear_probe",
    ),
    "miet_jpeg": Table(
        "miet.md",
        30,
        f"{MIET_TINY} {VIT} {LONG}",
        {
            f"miet blocks={blocks}{label}": f"method=miet method.blocks={blocks} {way}"
            for blocks in (0, 1)
            for label, way in (("", ""), (" features.jpeg=75", "features.jpeg=75"))
        },
        ("request_up_bytes", "request_down_bytes"),
        "miet blocks=0",
    ),
    "miet_omniglot": Table(
        "miet.md",
        40,
        f"+experiment=miet_omniglot data_dir={{data}} {VIT} dataset.seed={{seed}} seed={{seed}}",
        {
            "linear_probe": "method=linear_probe method.epochs=110",
            **named("miet", "blocks=0", more="method.epochs=110"),
            **named("miet", "blocks=1", more="method.epochs=60"),  # after 50 of a linear classifier
        },
        TUNING,
        "linear_probe",
    ),
    "miet_lite0": Table(
        "miet.md",
        10,
        f"{MIET_TINY} {LITE0_TOKENS}",
        {"linear_probe": f"method=linear_probe {LONG}", **named("miet", "blocks=0", "blocks=1", more=LONG)},
        TUNING,
        "linear_probe",
    ),
}

# parts of MIET, from one store of levels
TABLES |= {
    f"miet_{part}": Table(
        "miet.md", minutes, "", {}, columns, reference, script=f"miet_levels.py --part {part} {MIET} {VIT}"
    )
    for part, minutes, columns, reference in (
        ("sums", 15, ("request_down_bytes",), "linear, last level"),
        ("bytes", 15, ("request_down_bytes",), "linear"),
        ("blocks", 20, (), "linear"),
        ("shots", 30, (), "linear, last feature"),
    )
}

# ---- devices that learn on samples of the cloud

SAMPLES = ("client_down_bytes", "client_up_bytes")
OWN_ALONE = named("mpda", "arm=local")
CODA_TINY = (
    "+experiment=coda_tiny_imagenet data_dir={data} dataset.parents={parents} "
    "backbone.weights={weights:tf_efficientnet_lite0} partition.seed={seed} seed={seed} " + ALONE
)
BOUND = "retrieval=client_type"
CLICKS = ("gain", "client_accuracy", "client_gain", "improved_share", "harmed_share")

TABLES |= {
    "coda_tiny_imagenet": Table(
        "coda_mpda.md",
        90,
        CODA_TINY,
        swept(
            "partition.train_images",
            (5, 20, 50),
            OWN_ALONE
            | named("mpda", "")
            | named("coda", "", BOUND)
            | of("client_prior")
            | {"finetune": "method=finetune"},
        ),
        SAMPLES,
        "mpda arm=local",
        (f"coda {BOUND}",),
    ),
    "coda_parts": Table(
        "coda_mpda.md",
        60,
        CODA_TINY,
        swept(
            "partition.train_images",
            (5, 20),
            OWN_ALONE
            | named("mpda", "matching=random", "", "arm=match")
            | named("coda", "retrieval=random", "retrieval=sample keep=0.5", "retrieval=sample", "keep=0.5", ""),
        ),
        SAMPLES,
        "mpda arm=local",
    ),
    "coda_omniglot": Table(
        "coda_mpda.md",
        20,
        f"{OMNIGLOT} name=coda_omniglot partition.split=within {ALONE}",
        OWN_ALONE | named("mpda", "") | named("coda", "") | of("client_prior", "client_profile") | TUNED,
        reference="mpda arm=local",
    ),
    "coda_mnist": Table(
        "coda_mpda.md",
        40,
        f"+experiment=cnn_femnist {MNIST} backbone.reserve=0.1 backbone.recipe.epochs=5 partition.split=within "
        f"partition.train_images=20 training=default training.recipe.epochs=10 name=coda_mnist {ALL_SEEDS} {ALONE}",
        OWN_ALONE
        | named("mpda", "")
        | named("coda", "")
        | TUNED
        | of("client_prior", "client_profile")
        | {"iciia groups=256": "method=iciia method.groups=256"},
        ("gain",),
    ),
    "movielens": Table(
        "coda_mpda.md",
        40,
        "data_dir={data} name=movielens seed={seed} backbone.seed={seed}",
        {
            label: f"+experiment={label.split()[0]}_movielens {way}"
            for label, way in (
                named("mpda", "arm=local", "matching=random", "matching=overlap", "matching=overlap arm=selected")
                | named("coda", "ratio=2", "ratio=2 retrieval=random", "ratio=2 retrieval=sample keep=0.5")
            ).items()
        },
        CLICKS,
        task=CLICK,
    ),
    "movielens_models": Table(
        "coda_mpda.md",
        10,
        "+experiment=mpda_movielens data_dir={data} name=movielens seed={seed} backbone.seed={seed} method.arm=local",
        {model: f"backbone.model.model={model}" for model in ("lr", "wide_deep", "pnn", "deepfm", "din")},
        CLICKS,
        task=CLICK,
    ),
}

# ---- cloud and devices that train together

ROUNDS = ("seen_accuracy", "unseen_accuracy", "client_down_bytes", "rounds_down_bytes", "rounds_up_bytes")
BOUNDS = ("dc_ccl arm=large_on_device", "dc_ccl arm=centralised")
ARMS = ("arm=no_control", "arm=wrong_control")
DC_TINY = (
    "+experiment=dc_ccl_tiny_imagenet data_dir={first:60+20} "
    "backbone.weights={weights:tf_efficientnet_lite2+tf_efficientnet_lite0} seed={seed}"
)
#: `fedavg` has no such keys.
WITHOUT = "~method.unseen_logits ~method.control_epochs ~method.control_lr"


TABLES |= {
    "dc_ccl_digits": Table(
        "dc_ccl.md",
        60,
        f"+experiment=dc_ccl_digits {ALL_SEEDS}",
        {"fedavg, devices alone": "method=fedavg method.devices=1 method.cloud_weight=0 method.share_down=0"}
        | named("fedavg", "", "proximal=0.01", "proximal=0.1")
        | named("dc_ccl", *ARMS, "", "devices=1", "participation=0.5 unavailable=0.2")
        | named("dc_ccl", "retune=device", "retune=mixed", "retune=none", "payload=float16", "payload=int8")
        | named("dc_ccl", "arm=large_on_device", "arm=centralised"),
        ROUNDS,
        "dc_ccl",
        BOUNDS,
    ),
    "dc_ccl_mnist": Table(
        "dc_ccl.md",
        80,
        "+experiment=dc_ccl_mnist data_dir={data} seed={seed} backbone.seed={seed}",
        {"fedavg": "method=fedavg network@method.network=vgg method.devices=1"}
        | named("dc_ccl", *ARMS, "temperature=1", "", "arm=large_on_device"),
        ROUNDS,
        "dc_ccl",
        BOUNDS,
    ),
    "dc_ccl_tiny_imagenet": Table(
        "dc_ccl.md",
        30,
        DC_TINY,
        {
            label: f"{way} network@method.network=feature_perceptron {WITHOUT}"
            for label, way in {
                "fedavg, the device alone": "method=fedavg method.cloud_weight=0 method.share_down=0",
                "fedavg": "method=fedavg",
            }.items()
        }
        | named("dc_ccl", "temperature=1", "temperature=1.25")
        | named(
            "dc_ccl",
            *ARMS,
            "",
            "share_down=0",
            "payload=int8",
            "arm=large_on_device",
            "arm=centralised",
            more="method.temperature=1.5",
        ),
        ROUNDS,
        "dc_ccl",
        BOUNDS,
    ),
}

# ---- routing

ROUTERS = (
    {rule: f"method=fixed_router method.rule={rule}" for rule in ("random", "length")}
    | named("linear_router", "inputs=words", "inputs=tokens")
    | named("routellm", "")
    | named("hybrid_llm", "")
    | named("zooter", "")
    | named("route_t2i", "", "select=false", "gates=1", "metrics=[color]")
    | {"oracle_router": "method=oracle_router"}
)
ROUTED = ("rank_correlation", "win_rate_at_half", "delta_p_at_half", "truth_at_half", "cloud_share")
SECOND_PAIR = "backbone.seed=1 dataset.seed=1 backbone.model.seed=1 name=route_second_pair"

TABLES |= {
    name: Table(
        "route_t2i.md",
        40,
        f"+experiment=route_t2i_scenes {pair} seed={{seed}}",
        ROUTERS,
        ROUTED,
        "route_t2i",
        ("oracle_router",),
        QUALITY,
    )
    for name, pair in (("route_scenes", ""), ("route_second_pair", SECOND_PAIR))
}
TABLES |= {
    "route_tiny_imagenet": Table(
        "route_t2i.md",
        40,
        "+experiment=route_tiny_imagenet data_dir={first:60+20} partition.seed={seed} seed={seed} "
        "backbone.weights={weights:tf_efficientnet_lite2+tf_efficientnet_lite0}",
        {
            f"{score} {share}": f"method.score={score} method.share={share}"
            for score in ("confidence", "margin", "random")
            for share in (0, 0.1, 0.2, 0.3, 0.5)
        },
        ("cloud_share", "request_cloud_macs"),
    ),
}

# ---- speed, on an idle machine

TABLES |= {
    "speed_encoder": Table("benchmarks.md", 5, "", {}, script="bench_iciia.py encoder --dims 1280"),
    "speed_rivals": Table("rivals.md", 3, "", {}, script="bench_rivals.py"),
    "speed_latency": Table("serving.md", 3, "", {}, script="bench_latency.py"),
    "speed_service": Table(
        "serving.md", 5, "", {}, script="bench_service.py --known 15 --redis redis://127.0.0.1:6379"
    ),
}
