"""What KubeRay's custom resource definitions (ray.io/v1, KubeRay 1.6) allow in a RayCluster and a RayJob: JSON Schema.

Names, types and enumerations are those of the published definitions (helm-chart/kuberay-operator/crds and
ray-operator/apis/ray/v1 of the KubeRay project); status fields are left out. Pod templates are Kubernetes' own and are
checked with its own schema.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
BOOL: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
TEXTS: Schema = {"type": "object", "additionalProperties": STRING}
ANYTHING: Schema = {}
POD_TEMPLATE: Schema = {"type": "object", "required": ["spec"]}


def record(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """An object with no other keys than these."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


HEAD_GROUP = record(
    ("rayStartParams", "template"),
    serviceType=STRING,
    headService=ANYTHING,
    enableIngress=BOOL,
    rayStartParams=TEXTS,
    template=POD_TEMPLATE,
)
WORKER_GROUP = record(
    ("groupName", "maxReplicas", "minReplicas", "rayStartParams", "template"),
    groupName=STRING,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    idleTimeoutSeconds=COUNT,
    rayStartParams=TEXTS,
    template=POD_TEMPLATE,
    scaleStrategy=ANYTHING,
)
AUTOSCALER = record(
    resources=ANYTHING,
    image=STRING,
    imagePullPolicy=STRING,
    env=ANYTHING,
    envFrom=ANYTHING,
    volumeMounts=ANYTHING,
    securityContext=ANYTHING,
    idleTimeoutSeconds=COUNT,
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    version=one_of("v1", "v2"),
)
CLUSTER_SPEC = record(
    ("headGroupSpec",),
    authOptions=record(mode=one_of("disabled", "token"), enableK8sTokenAuth=BOOL),
    autoscalerOptions=AUTOSCALER,
    enableInTreeAutoscaling=BOOL,
    gcsFaultToleranceOptions=ANYTHING,
    headGroupSpec=HEAD_GROUP,
    headServiceAnnotations=TEXTS,
    rayVersion=STRING,
    suspend=BOOL,
    workerGroupSpecs={"type": "array", "items": WORKER_GROUP},
)
JOB_SPEC = record(
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    rayClusterSpec=CLUSTER_SPEC,
    submitterPodTemplate=POD_TEMPLATE,
    metadata=TEXTS,
    clusterSelector=TEXTS,
    submitterConfig=record(backoffLimit=COUNT),
    managedBy=STRING,
    deletionStrategy=ANYTHING,
    entrypoint=STRING,
    runtimeEnvYAML=STRING,
    jobId=STRING,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode"),
    entrypointResources=STRING,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    ttlSecondsAfterFinished=COUNT,
    shutdownAfterJobFinishes=BOOL,
    suspend=BOOL,
)
KINDS = {"RayCluster": CLUSTER_SPEC, "RayJob": JOB_SPEC}


def manifest_schema(kind: str) -> Schema:
    """Schema of a whole manifest."""
    return record(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata={"type": "object", "required": ["name"]},
        spec=KINDS[kind],
    )
