/**
 * Waits for work until a limit and no longer: `limit`'s reason is thrown then.
 * The work itself goes on and ends by its own limits; what becomes of it nobody hears.
 */
export async function within<T>(limit: AbortSignal, work: Promise<T>): Promise<T> {
  const over = Promise.withResolvers<never>();
  const end = (): void => over.reject(limit.reason);
  if (limit.aborted) end();
  else limit.addEventListener("abort", end, { once: true });
  try {
    return await Promise.race([work, over.promise]);
  } finally {
    limit.removeEventListener("abort", end);
  }
}
