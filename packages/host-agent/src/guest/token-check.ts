/** Whether envd takes the token that we have: one that was started again in its guest takes none. */
import { readSmallBody } from "./process-calls.ts";
import type { Guest } from "./process-calls.ts";

/** One question to envd; what breaks is thrown as it comes. */
export async function takesToken(
  { pool, accessToken, limits }: Guest,
  signal: AbortSignal,
): Promise<boolean> {
  const response = await pool.request({
    method: "GET",
    path: "/metrics",
    headers: { "x-access-token": accessToken },
    signal,
  });
  await readSmallBody(response, limits);
  return response.statusCode !== 401;
}
