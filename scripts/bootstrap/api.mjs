/** The few calls of the API that the bootstrap makes, over plain fetch. */
import { StepError } from "./run.mjs";

/** Longer than the API itself gives a create, whose first one of a shape boots its warm image. */
const ANSWER_MS = 240_000;

/** @param {{url: string, key: string}} options */
export function apiClient({ url, key }) {
  const call = async (method, path, body) => {
    const begun = fetch(new URL(path, url), {
      method,
      headers: { "x-api-key": key, ...(body === undefined ? {} : { "content-type": "application/json" }) },
      ...(body === undefined ? {} : { body: JSON.stringify(body) }),
      signal: AbortSignal.timeout(ANSWER_MS),
    });
    const response = await begun.catch((cause) => {
      const reason = cause.name === "TimeoutError" ? `no answer within ${ANSWER_MS / 1000} s` : cause.message;
      throw new StepError(`${method} ${path}: ${reason}. The logs of control plane and agent may say why.`);
    });
    const text = await response.text();
    return { status: response.status, ok: response.ok, body: text === "" ? undefined : parse(text) };
  };
  const demand = async (method, path, body) => {
    const answer = await call(method, path, body);
    if (answer.ok) return answer.body;
    const error = answer.body?.error;
    throw new StepError(`${method} ${path}: ${answer.status} ${error?.code ?? ""} ${error?.message ?? ""}`);
  };
  const quietly = async (path) => {
    try {
      return await call("GET", path);
    } catch {
      // Not listening yet: the caller polls.
      return undefined;
    }
  };
  return {
    post: (path, body) => demand("POST", path, body),
    delete: (path) => demand("DELETE", path),
    /** The body, or undefined when there is no such thing. */
    find: async (path) => {
      const answer = await call("GET", path);
      if (answer.status === 404) return undefined;
      if (!answer.ok)
        throw new StepError(`GET ${path}: ${answer.status} ${answer.body?.error?.message ?? ""}`);
      return answer.body;
    },
    isReady: async () => (await quietly("/readyz"))?.ok === true,
    answers: async () => (await quietly("/healthz")) !== undefined,
    accepts: async () => (await quietly("/v1/sandboxes?limit=1"))?.ok === true,
  };
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return { error: { code: "", message: text.slice(0, 200) } };
  }
}
