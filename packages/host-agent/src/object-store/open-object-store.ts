/** The object store of the configuration: the only place that knows which drivers there are. */
import type { ObjectStoreSettings } from "../config.ts";
import { DirectoryStore } from "./directory.ts";
import type { ObjectStore } from "./object-store.ts";

export async function openObjectStore(settings: ObjectStoreSettings): Promise<ObjectStore> {
  if (settings.kind === "directory") return new DirectoryStore(settings.path);
  // The SDK is large: loaded only where it is used.
  const { S3Store } = await import("./s3.ts");
  return new S3Store(settings);
}
