/** The few calls of the API that the bootstrap makes, over plain fetch. */
import { StepError } from "./run.mjs";

/** @param {{url: string, key: string}} options */
export function apiClient({ url, key }) {
  const call = async (method, path, body) => {
    const response = await fetch(new URL(path, url), {
      method,
      headers: { "x-api-key": key, ...(body === undefined ? {} : { "content-type": "application/json" }) },
      ...(body === undefined ? {} : { body: JSON.stringify(body) }),
      // The first create of a shape boots its warm image.
      signal: AbortSignal.timeout(180_000),
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
